"""Decide the source of every value of every param_group before anything is changed.

Planning is pure: no torch.distributed, no I/O, no tensor. The same policy, saved groups and
current groups give the same `ResumePlan` and the same `ResumePlan.digest` on every rank.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..base.values import plain
from ..checkpoint.state import NOT_HYPERPARAMETERS, SavedOptimizer
from ..errors import PlanError, PolicyError
from ..policy.phase import Phase
from ..policy.policy import SCHEDULE_KEYS, SCHEDULER_ATTRIBUTES, ResumePolicy
from ..policy.presets import Change
from .cautions import cautions
from .decisions import Circumstances, Decision, GroupPlan, ResumePlan, Source
from .groups import counterpart


def plan_resume(
    policy: ResumePolicy,
    saved: SavedOptimizer,
    current_groups: Sequence[Mapping[str, Any]],
    circumstances: Circumstances | None = None,
    phase: Phase | None = None,
) -> ResumePlan:
    """Decide for every key of every current param_group.

    Args:
        policy: The user's policy, or `phase.policy`.
        saved: The checkpoint's groups and step.
        current_groups: The live optimizer's param_groups as built from the current arguments.
            ``params`` and ``step`` are ignored.
        circumstances: Facts about the current run that decisions and warnings depend on.
        phase: The phase that begins or continues.

    Returns:
        The plan. Nothing is changed.

    Raises:
        PlanError: A key to be kept is unknown, two saved groups fit one current group and differ
            in a key to be kept, or a preset cannot be applied to these hyperparameters.
    """
    circumstances = circumstances or Circumstances()
    _check_known(policy, saved, current_groups)
    pairs = [counterpart(policy, group, current_groups, saved.groups) for group in current_groups]
    used = {i for i, _ in pairs if i is not None}
    groups = tuple(
        _plan_group(policy, index, group, saved.groups, *pair)
        for index, (group, pair) in enumerate(zip(current_groups, pairs, strict=True))
    )
    clip_grad = None
    if not circumstances.live:
        clip_grad = _clip_grad(policy, circumstances)
    optimizer = circumstances.optimizer
    if optimizer.adam and not circumstances.live:
        groups = tuple(_derive(policy, group) for group in groups)
    _refuse_coupled_decay(policy, groups, circumstances)
    step = saved.step if optimizer.step is None else _next_step(policy, saved.step)
    plan = ResumePlan(
        groups=groups,
        step=step,
        unused_saved_groups=tuple(i for i in range(len(saved.groups)) if i not in used),
        policy=policy,
        saved_step=saved.step,
        clip_grad=clip_grad,
        phase=phase,
        optimizer=optimizer,
    )
    return replace(plan, warnings=cautions(plan, circumstances))


def _check_known(
    policy: ResumePolicy, saved: SavedOptimizer, current_groups: Sequence[Mapping[str, Any]]
) -> None:
    known = {k for g in (*saved.groups, *current_groups) for k in g} | set(SCHEDULER_ATTRIBUTES)
    known -= {*NOT_HYPERPARAMETERS, "lr"}
    for name in ("keep_hyperparameters", "take_hyperparameters"):
        _require_known(f"--selective-{name.replace('_', '-')}", getattr(policy, name), known)
    for rule in policy.groups:
        _require_known(f"group rule {str(rule)!r}", (*rule.keep, *rule.take), known)


def _require_known(where: str, keys: Sequence[str], known: set[str]) -> None:
    unknown = [k for k in keys if k not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise PlanError(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; "
            "neither the checkpoint's param_groups nor the current ones have it. "
            f"{hint}Known keys: {', '.join(sorted(known))}"
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
    keys = [k for k in group if k not in NOT_HYPERPARAMETERS]
    asked = {*policy.named_keys, *(SCHEDULE_KEYS if policy.schedule == "checkpoint" else ())}
    only_saved = [k for k in saved if k not in group]
    kept_only_there = [k for k in only_saved if k in asked and policy.source(k, group)[0]]
    decisions = tuple(_decide(policy, k, group, saved, note) for k in (*keys, *kept_only_there))
    dropped = tuple(k for k in only_saved if k not in kept_only_there)
    return GroupPlan(index, saved_index, note, decisions, dropped)


def _decide(
    policy: ResumePolicy,
    key: str,
    group: Mapping[str, Any],
    saved: Mapping[str, Any],
    note: str,
) -> Decision:
    argument, checkpoint = group.get(key), saved.get(key)
    from_checkpoint, reason = policy.source(key, group)
    taken: Source = "arguments"
    if from_checkpoint and key in saved:
        taken = "checkpoint"
    elif from_checkpoint:
        reason += f", but the saved group has no {key}" if saved else f", but {note}"
    return Decision(key, plain(checkpoint), argument, taken, reason)


def _derive(policy: ResumePolicy, group: GroupPlan) -> GroupPlan:
    """Apply the preset's changes to the hyperparameters that come from the arguments."""
    changes = {c.key: c for c in policy.preset.effect.changes}
    decisions = tuple(
        _changed(policy, d, changes[d.key])
        if d.key in changes and d.taken == "arguments" and d.argument is not None
        else d
        for d in group.decisions
    )
    return replace(group, decisions=decisions)


def _changed(policy: ResumePolicy, decision: Decision, change: Change) -> Decision:
    value = plain(decision.argument)
    try:
        derived = change.apply(value)
    except PolicyError as e:
        raise PlanError(str(e)) from None
    reason = f"preset {policy.preset}: {change.formula(value)}"
    return replace(decision, taken="preset", reason=reason, derived=derived)


def _clip_grad(policy: ResumePolicy, circumstances: Circumstances) -> Decision | None:
    for change in policy.preset.effect.changes:
        if change.key == "clip_grad" and circumstances.clip_grad > 0.0:
            here = Decision("clip_grad", None, circumstances.clip_grad, "arguments", "default")
            return _changed(policy, here, change)
    return None


def _refuse_coupled_decay(
    policy: ResumePolicy, groups: Sequence[GroupPlan], circumstances: Circumstances
) -> None:
    """Raise for gradient-scale with L2 decay: L2 in the gradient is not scaled with it."""
    decays = {d.value for g in groups for d in g.decisions if d.key == "weight_decay"}
    l2 = circumstances.optimizer.coupled_decay or not circumstances.decoupled_weight_decay
    coupled = l2 and any(decays)
    if policy.preset.name == "gradient-scale" and coupled:
        raise PlanError(
            f"preset {policy.preset}: weight decay is coupled (L2 in the gradient, weight_decay "
            f"{sorted(decays)}), so the update of {circumstances.optimizer.name} changes with the "
            "gradient's scale. Use decoupled weight decay (AdamW), or scale the moments by rules"
        )


def _next_step(policy: ResumePolicy, saved_step: int | None) -> int | None:
    match policy.next_step:
        case "keep":
            return saved_step
        case "reset":
            return None if saved_step is None else 0
        case number:
            return int(number)
