"""What a plan consists of: one decision for each key of each param_group. Plain data."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..base.values import plain, same
from ..policy.phase import Phase
from ..policy.policy import ResumePolicy

Source = Literal["arguments", "checkpoint", "preset"]


@dataclass(frozen=True)
class Decision:
    """Where one key of one param_group comes from.

    Args:
        key: The param_group key.
        checkpoint: The saved value, or None where the checkpoint has none.
        argument: The current value, or None where the current group has none.
        taken: Which of the two is used; ``preset``: what a preset makes of the argument.
        reason: Why, in one phrase.
        derived: The value, for ``preset``.
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
        dropped: Keys of the counterpart that the current group does not have and does not get.
    """

    index: int
    saved_index: int | None
    note: str
    decisions: tuple[Decision, ...]
    dropped: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, Any]:
        """Key -> value the live group has after the resume (without params and step)."""
        return {d.key: d.value for d in self.decisions}


@dataclass(frozen=True)
class ResumePlan:
    """Everything a resume of one optimizer will do to its groups and step.

    Args:
        groups: One per current param_group, in order.
        step: The step that goes on, or None if none was taken yet.
        unused_saved_groups: Saved groups that no current group corresponds to.
        policy: The policy it was made from; of a phase that goes on, what is left of the user's.
        saved_step: The checkpoint's step.
        clip_grad: What gradient clipping becomes, where a preset changes it.
        warnings: What is dangerous about it, with the number.
        phase: Whether a phase begins or goes on; None for a live optimizer.
    """

    groups: tuple[GroupPlan, ...]
    step: int | None
    unused_saved_groups: tuple[int, ...]
    policy: ResumePolicy
    saved_step: int | None = None
    clip_grad: Decision | None = None
    warnings: tuple[str, ...] = ()
    phase: Phase | None = None

    @property
    def mark(self) -> str | None:
        """What the param_groups carry from now on."""
        mark = None if self.phase is None else self.phase.mark
        return None if mark is None else str(mark)

    @property
    def continued(self) -> bool:
        """Whether the checkpoint is the phase's own."""
        return self.phase is not None and self.phase.state == "continued"

    def digest(self) -> str:
        """Hex SHA-256 of all decisions; equal on two ranks if and only if they will do the same."""
        keys = ("keep_hyperparameters", "take_hyperparameters")
        in_order: dict[str, Any] = {k: tuple(sorted(getattr(self.policy, k))) for k in keys}
        content = {
            "step": self.step,
            "policy": repr(replace(self.policy, **in_order)),
            "phase": None if self.phase is None else [self.phase.state, self.mark],
            "clip_grad": None if self.clip_grad is None else self.clip_grad.value,
            "groups": [
                [g.saved_index, {d.key: [d.taken, plain(d.value)] for d in g.decisions}]
                for g in self.groups
            ],
        }
        text = json.dumps(content, sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Circumstances:
    """What else of the current run a plan looks at.

    Args:
        clip_grad: Largest gradient norm; 0: no clipping.
        decoupled_weight_decay: AdamW; False: L2 in the gradient.
        global_batch_size: Of the checkpoint's run and of this one, or None where unknown.
        live: The state is that of the running optimizer: hyperparameters are left alone.
        adam: False for the part of a chain that another optimizer updates (Muon): its state, its
            step and what a preset would change are left alone.
    """

    clip_grad: float = 0.0
    decoupled_weight_decay: bool = True
    global_batch_size: tuple[int, int] | None = None
    live: bool = False
    adam: bool = True
