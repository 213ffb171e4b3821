"""Decide, before anything is changed, where every value of every param_group comes from.

Planning is pure: no torch.distributed, no I/O, no tensor. The same policy, saved groups and
current groups give the same `ResumePlan` and the same `ResumePlan.digest` on every rank.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .checkpoint import SavedOptimizer
from .errors import PlanError
from .policy import SCHEDULER_ATTRIBUTES, ResumePolicy

#: What makes two param_groups the same group across two runs. The bounds max_lr and min_lr are
#: not among them: they are what a phase change changes.
STRUCTURAL_KEYS = ("is_expert_parallel", "wd_mult", "lr_mult", "is_decoupled_lr", "optimizer")

#: Values Megatron gives a group that does not carry the key (`_get_param_groups`,
#: core/optimizer/__init__.py).
_STRUCTURAL_DEFAULTS = {
    "is_expert_parallel": False,
    "wd_mult": 1.0,
    "lr_mult": 1.0,
    "is_decoupled_lr": False,
    "optimizer": None,
}

#: Keys that never identify a group: they change within a run, or are what a phase change changes.
_NOT_AN_IDENTITY = frozenset(
    {*STRUCTURAL_KEYS, "lr", "weight_decay", "max_lr", "min_lr", "step", "params"}
)

_ABSENT = object()

Source = Literal["arguments", "checkpoint"]


@dataclass(frozen=True)
class Decision:
    """Where one key of one param_group comes from.

    Args:
        key: The param_group key.
        checkpoint: The saved value, or None where the checkpoint has none.
        argument: The current value, or None where the current group has none.
        taken: Which of the two is used.
        reason: Why, in one phrase.
    """

    key: str
    checkpoint: Any
    argument: Any
    taken: Source
    reason: str

    @property
    def value(self) -> Any:
        """The value that is used."""
        return self.checkpoint if self.taken == "checkpoint" else self.argument

    @property
    def changed(self) -> bool:
        """Whether the resume gives the key another value than the checkpoint had."""
        return not _same(self.value, self.checkpoint)


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
        step: The step that goes on (from the checkpoint), or None if none was taken yet.
        unused_saved_groups: Saved groups that no current group corresponds to.
        policy: The policy it was made from.
    """

    groups: tuple[GroupPlan, ...]
    step: int | None
    unused_saved_groups: tuple[int, ...]
    policy: ResumePolicy

    def digest(self) -> str:
        """Hex SHA-256 of all decisions; equal on two ranks if and only if they will do the same."""
        content = {
            "step": self.step,
            "policy": [sorted(self.policy.kept_keys), self.policy.schedule],
            "groups": [
                [g.saved_index, {d.key: [d.taken, _plain(d.value)] for d in g.decisions}]
                for g in self.groups
            ],
        }
        text = json.dumps(content, sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()


def plan_resume(
    policy: ResumePolicy,
    saved: SavedOptimizer,
    current_groups: Sequence[Mapping[str, Any]],
) -> ResumePlan:
    """Decide for every key of every current param_group.

    Args:
        policy: What the user asked.
        saved: The checkpoint's groups and step.
        current_groups: The live optimizer's param_groups as the current arguments made them.
            ``params`` and ``step`` are ignored.

    Returns:
        The plan; nothing is changed.

    Raises:
        PlanError: A key to be kept is unknown, or two saved groups fit one current group and
            differ in a key to be kept.
    """
    _check_known(policy, saved, current_groups)
    pairs = [_counterpart(policy, group, current_groups, saved.groups) for group in current_groups]
    used = {i for i, _ in pairs if i is not None}
    return ResumePlan(
        groups=tuple(
            _plan_group(policy, index, group, saved.groups, *pair)
            for index, (group, pair) in enumerate(zip(current_groups, pairs, strict=True))
        ),
        step=saved.step,
        unused_saved_groups=tuple(i for i in range(len(saved.groups)) if i not in used),
        policy=policy,
    )


def match_groups(
    saved_groups: Sequence[Mapping[str, Any]],
    current_groups: Sequence[Mapping[str, Any]],
    saved_sizes: Sequence[int],
    current_sizes: Sequence[int],
) -> list[int | None]:
    """Pair saved with current groups, one to one, by what does not change between phases.

    Needed only where parameters are identified by their position in the groups: the legacy
    format of the non-distributed optimizers.

    Args:
        saved_groups: The checkpoint's param_groups.
        current_groups: The live param_groups.
        saved_sizes: Number of parameters in each saved group.
        current_sizes: Number of parameters in each live group.

    Returns:
        For each current group the index of its saved counterpart, or None where there is none or
        more than one.
    """
    saved = [{**g, "params": n} for g, n in zip(saved_groups, saved_sizes, strict=True)]
    current = [{**g, "params": n} for g, n in zip(current_groups, current_sizes, strict=True)]
    fits = [_candidates(g, current, saved, frozenset(), size_counts=True) for g in current]
    pairs = [fit[0] if len(fit) == 1 else None for fit in fits]
    return [i if pairs.count(i) == 1 else None for i in pairs]


def _check_known(
    policy: ResumePolicy, saved: SavedOptimizer, current_groups: Sequence[Mapping[str, Any]]
) -> None:
    known = {k for g in (*saved.groups, *current_groups) for k in g} | set(SCHEDULER_ATTRIBUTES)
    known -= {"params", "step", "lr"}
    unknown = [k for k in policy.keep_hyperparameters if k not in known]
    if unknown:
        raise PlanError(
            f"--selective-keep-hyperparameters: unknown key {', '.join(map(repr, unknown))}; "
            "neither the checkpoint's param_groups nor the current ones have it. "
            f"Known keys: {', '.join(sorted(known))}"
        )


def _plan_group(
    policy: ResumePolicy,
    index: int,
    group: Mapping[str, Any],
    saved_groups: Sequence[Mapping[str, Any]],
    saved_index: int | None,
    note: str,
) -> GroupPlan:
    saved = saved_groups[saved_index] if saved_index is not None else {}
    keys = [k for k in group if k not in ("params", "step")]
    kept_only_there = [k for k in saved if k not in group and k in policy.kept_keys]
    decisions = tuple(_decide(policy, k, group, saved, note) for k in (*keys, *kept_only_there))
    dropped = tuple(k for k in saved if k not in group and k not in policy.kept_keys)
    return GroupPlan(index, saved_index, note, decisions, dropped)


def _decide(
    policy: ResumePolicy,
    key: str,
    group: Mapping[str, Any],
    saved: Mapping[str, Any],
    note: str,
) -> Decision:
    argument, checkpoint = group.get(key), saved.get(key)
    taken: Source = "arguments"
    if key not in policy.kept_keys:
        reason = "default"
    elif key in saved:
        taken, reason = "checkpoint", policy.why_kept(key)
    elif saved:
        reason = f"{policy.why_kept(key)}, but the saved group has no {key}"
    else:
        reason = f"{policy.why_kept(key)}, but {note}"
    return Decision(key, _plain(checkpoint), argument, taken, reason)


def _counterpart(
    policy: ResumePolicy,
    group: Mapping[str, Any],
    current_groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
) -> tuple[int | None, str]:
    """Find the saved group a current group goes on from; ambiguity matters only for kept keys."""
    fit = _candidates(group, current_groups, saved_groups, policy.kept_keys)
    if not fit:
        return None, "the checkpoint has no such group (added since)"
    for key in sorted(policy.kept_keys & {k for i in fit for k in saved_groups[i]}):
        values = [saved_groups[i].get(key, _ABSENT) for i in fit]
        if any(not _same(v, values[0]) for v in values[1:]):
            listing = "\n".join(f"  saved group {i}: {dict(saved_groups[i])}" for i in fit)
            raise PlanError(
                f"{policy.why_kept(key)}: {len(fit)} saved param_groups fit the current group "
                f"{_identity(group)} and differ in {key!r}:\n{listing}\n"
                f"  current group: { {k: v for k, v in group.items() if k != 'params'} }\n"
                f"Leave out {policy.why_kept(key)}: the values then come from the arguments"
            )
    if len(fit) == 1:
        return fit[0], "same group"
    position = _rank_among_twins(group, current_groups)
    return fit[min(position, len(fit) - 1)], f"one of {len(fit)} saved groups that fit, by order"


def _candidates(
    group: Mapping[str, Any],
    current_groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
    kept: frozenset[str],
    *,
    size_counts: bool = False,
) -> list[int]:
    """Saved groups with the same structural keys, narrowed by values that both phases share."""
    fit = [i for i, s in enumerate(saved_groups) if _identity(s) == _identity(group)]
    if len(fit) < 2:
        return fit
    twins = [g for g in current_groups if _identity(g) == _identity(group)]
    ignored = _NOT_AN_IDENTITY - ({"params"} if size_counts else set())
    keys = sorted({k for i in fit for k in saved_groups[i]} & set(group) - ignored - kept)
    # A value identifies a group only if the phase change did not touch it: the same values, as
    # often, among the twins of both phases.
    steady = [
        k
        for k in keys
        if Counter(_label(g.get(k)) for g in twins)
        == Counter(_label(saved_groups[i].get(k)) for i in fit)
    ]
    same = [i for i in fit if all(_same(saved_groups[i].get(k), group.get(k)) for k in steady)]
    return same or fit


def _rank_among_twins(group: Mapping[str, Any], current_groups: Sequence[Mapping[str, Any]]) -> int:
    twins = [g for g in current_groups if _identity(g) == _identity(group)]
    return next(i for i, g in enumerate(twins) if g is group)


def _identity(group: Mapping[str, Any]) -> tuple[Any, ...]:
    values = ((k, group.get(k)) for k in STRUCTURAL_KEYS)
    return tuple(_STRUCTURAL_DEFAULTS[k] if v is None else v for k, v in values)


def _plain(value: Any) -> Any:
    """A 0-dim tensor (a capturable lr) as a Python number; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _same(a: Any, b: Any) -> bool:
    a, b = _plain(a), _plain(b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return list(a) == list(b)
    return bool(a == b)


def _label(value: Any) -> str:
    value = _plain(value)
    return repr(list(value) if isinstance(value, tuple) else value)
