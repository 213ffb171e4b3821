"""Pair the param_groups of two phases by the values that both share. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..base.values import plain, same
from ..errors import PlanError
from ..policy.policy import SCHEDULE_KEYS, ResumePolicy

#: Keys that identify a param_group across runs. The bounds max_lr and min_lr do not: a phase change
#: changes them.
STRUCTURAL_KEYS = ("is_expert_parallel", "wd_mult", "lr_mult", "is_decoupled_lr", "optimizer")
#: Megatron's values for a group without the key (`_get_param_groups`, core/optimizer/__init__.py).
_STRUCTURAL_DEFAULTS = {
    "is_expert_parallel": False,
    "wd_mult": 1.0,
    "lr_mult": 1.0,
    "is_decoupled_lr": False,
    "optimizer": None,
}
#: Keys that never identify a group, because they change during a run or at a phase change.
_NOT_AN_IDENTITY = frozenset(
    {*STRUCTURAL_KEYS, "lr", "weight_decay", "max_lr", "min_lr", "step", "params"}
)
_ABSENT = object()


def match_groups(
    saved_groups: Sequence[Mapping[str, Any]],
    current_groups: Sequence[Mapping[str, Any]],
    saved_sizes: Sequence[int],
    current_sizes: Sequence[int],
) -> list[int | None]:
    """Pair saved with current groups, one to one, by the values that both phases share.

    Only the legacy format of the non-distributed optimizers needs this: it identifies parameters
    by their position in the groups.

    Args:
        saved_groups: The checkpoint's param_groups.
        current_groups: The live param_groups.
        saved_sizes: Number of parameters in each saved group.
        current_sizes: Number of parameters in each live group.

    Returns:
        For each current group the index of its saved counterpart, or None if none or several fit.
    """
    saved = [{**g, "params": n} for g, n in zip(saved_groups, saved_sizes, strict=True)]
    current = [{**g, "params": n} for g, n in zip(current_groups, current_sizes, strict=True)]
    fits = [_candidates(g, current, saved, frozenset(), size_counts=True) for g in current]
    pairs = [fit[0] if len(fit) == 1 else None for fit in fits]
    return [i if pairs.count(i) == 1 else None for i in pairs]


def counterpart(
    policy: ResumePolicy,
    group: Mapping[str, Any],
    current_groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
) -> tuple[int | None, str]:
    """Find the saved counterpart of a current group; several may fit if their kept keys agree."""
    saved_keys = {k for g in saved_groups for k in g}
    kept = frozenset(k for k in saved_keys if policy.source(k, group)[0])
    # Keys that are kept by name cannot identify a group; keys that are kept with all others can.
    by_name = kept & {*policy.named_keys, *SCHEDULE_KEYS}
    fit = _candidates(group, current_groups, saved_groups, by_name)
    if not fit:
        return None, "the checkpoint has no such group (added since)"
    for key in sorted(kept & {k for i in fit for k in saved_groups[i]}):
        values = [saved_groups[i].get(key, _ABSENT) for i in fit]
        if any(not same(v, values[0]) for v in values[1:]):
            why = policy.source(key, group)[1]
            listing = "\n".join(f"  saved group {i}: {dict(saved_groups[i])}" for i in fit)
            raise PlanError(
                f"{why}: {len(fit)} saved param_groups fit the current group "
                f"{identity_of_group(group)} and differ in {key!r}:\n{listing}\n"
                f"  current group: { {k: v for k, v in group.items() if k != 'params'} }\n"
                f"Leave out {why}: the values then come from the arguments"
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
    """List saved groups with the same structural keys, narrowed by values that both share."""
    fit = [
        i for i, s in enumerate(saved_groups) if identity_of_group(s) == identity_of_group(group)
    ]
    if len(fit) < 2:
        return fit
    twins = [g for g in current_groups if identity_of_group(g) == identity_of_group(group)]
    ignored = _NOT_AN_IDENTITY - ({"params"} if size_counts else set())
    keys = sorted({k for i in fit for k in saved_groups[i]} & set(group) - ignored - kept)
    # A key identifies a group only if the phase change did not touch it: its values then occur
    # equally often among the twins of both phases.
    steady = [
        k
        for k in keys
        if Counter(_label(g.get(k)) for g in twins)
        == Counter(_label(saved_groups[i].get(k)) for i in fit)
    ]
    alike = [i for i in fit if all(same(saved_groups[i].get(k), group.get(k)) for k in steady)]
    return alike or fit


def _rank_among_twins(group: Mapping[str, Any], current_groups: Sequence[Mapping[str, Any]]) -> int:
    twins = [g for g in current_groups if identity_of_group(g) == identity_of_group(group)]
    return next(i for i, g in enumerate(twins) if g is group)


def identity_of_group(group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the values that identify a param_group in both phases."""
    values = ((k, group.get(k)) for k in STRUCTURAL_KEYS)
    return tuple(_STRUCTURAL_DEFAULTS[k] if v is None else v for k, v in values)


def _label(value: Any) -> str:
    value = plain(value)
    return repr(list(value) if isinstance(value, tuple) else value)
