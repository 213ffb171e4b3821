"""The parts of a plan: one decision for each key of each param_group. Plain data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..base.text import Summary
from ..base.values import plain, same
from ..host.optimizers import ADAM, OptimizerState
from ..policy.phase import Phase
from ..policy.policy import ResumePolicy

Source = Literal["arguments", "checkpoint", "preset"]


@dataclass(frozen=True)
class Decision:
    """The source and value of one key of one param_group.

    Args:
        key: The param_group key.
        checkpoint: The saved value, or None if the checkpoint has none.
        argument: The current value, or None if the current group has none.
        taken: The source that is used; ``preset`` if a preset computes the value from the argument.
        reason: The reason in one phrase.
        derived: The computed value, for ``preset``.
    """

    key: str
    checkpoint: Any
    argument: Any
    taken: Source
    reason: str
    derived: Any = None

    @property
    def value(self) -> Any:
        """The value that is used."""
        if self.taken == "preset":
            return self.derived
        return self.checkpoint if self.taken == "checkpoint" else self.argument

    @property
    def changed(self) -> bool:
        """Whether the resume gives the key another value than the checkpoint had."""
        return not same(self.value, self.checkpoint)


@dataclass(frozen=True)
class GroupPlan:
    """The decisions for one current param_group.

    Args:
        index: Position among the current optimizer's param_groups.
        saved_index: Position of its counterpart in the checkpoint, or None.
        note: How the counterpart was found, or why there is none.
        decisions: One per key, in the current group's order.
        dropped: Keys of the counterpart that the current group neither has nor gets.
    """

    index: int
    saved_index: int | None
    note: str
    decisions: tuple[Decision, ...]
    dropped: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Any]:
        """Key -> value in the live group after the resume, without params and step."""
        return {d.key: d.value for d in self.decisions}


@dataclass(frozen=True, repr=False)
class ResumePlan(Summary):
    """All changes that a resume of one optimizer makes to its groups and step.

    Args:
        groups: One per current param_group, in order.
        step: The step after the resume, or None if none was taken yet.
        unused_saved_groups: Saved groups without a counterpart among the current ones.
        policy: The policy it was made from; in a continued phase without one-time operations.
        saved_step: The checkpoint's step.
        clip_grad: The new gradient clipping, if a preset changes it.
        warnings: Its risks, with the size of the effect.
        phase: The phase that begins or continues; None for a live optimizer.
        optimizer: The state of the optimizer.
    """

    groups: tuple[GroupPlan, ...]
    step: int | None
    unused_saved_groups: tuple[int, ...]
    policy: ResumePolicy
    saved_step: int | None = None
    clip_grad: Decision | None = None
    warnings: tuple[str, ...] = ()
    phase: Phase | None = None
    optimizer: OptimizerState = ADAM

    @property
    def mark(self) -> str | None:
        """The mark that the param_groups get."""
        mark = None if self.phase is None else self.phase.mark
        return None if mark is None else str(mark)

    @property
    def continued(self) -> bool:
        """Whether the checkpoint is the phase's own."""
        return self.phase is not None and self.phase.state == "continued"

    def summary(self) -> dict[str, object]:
        """Return what changes."""
        decisions = [d for g in self.groups for d in g.decisions]
        changed = dict.fromkeys(d.key for d in decisions if d.changed)
        return {
            "phase": "none" if self.phase is None else self.phase.state,
            "step": self.step,
            "param_groups": len(self.groups),
            "changed": ", ".join(changed) or "nothing",
            "warnings": len(self.warnings),
        }

    def digest(self) -> str:
        """Hex SHA-256 of all decisions; equal on two ranks if and only if they will do the same."""
        return hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()

    def facts(self) -> dict[str, str]:
        """Return a name and the value of every decision, as text."""
        keys = ("keep_hyperparameters", "take_hyperparameters")
        in_order: dict[str, Any] = {k: tuple(sorted(getattr(self.policy, k))) for k in keys}
        facts: dict[str, Any] = {
            "step": self.step,
            "phase": None if self.phase is None else f"{self.phase.state}, {self.mark}",
            "clip_grad": None if self.clip_grad is None else plain(self.clip_grad.value),
            **replace(self.policy, **in_order).facts(),
        }
        for number, group in enumerate(self.groups):
            facts[f"param_group {number}, saved as"] = group.saved_index
            for one in group.decisions:
                value = json.dumps(plain(one.value), default=repr)  # a tuple as a list
                facts[f"param_group {number}, {one.key}"] = f"{value} ({one.taken})"
        return {name: str(value) for name, value in facts.items()}


@dataclass(frozen=True)
class Circumstances:
    """Facts about the current run that a plan depends on.

    Args:
        clip_grad: Largest gradient norm; 0 means no clipping.
        decoupled_weight_decay: False for L2 in the gradient, as in Adam without W.
        global_batch_size: Batch sizes of the checkpoint's run and of this one, in samples; None if
            unknown.
        live: Whether the state is the running optimizer's. Its hyperparameters do not change.
        optimizer: The state of the optimizer, one of a chain's.
    """

    clip_grad: float = 0.0
    decoupled_weight_decay: bool = True
    global_batch_size: tuple[int, int] | None = None
    live: bool = False
    optimizer: OptimizerState = ADAM
