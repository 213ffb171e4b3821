"""Decide, before anything is changed, where every value of every param_group comes from.

Planning is pure: no torch.distributed, no I/O, no tensor. The same policy, saved groups and
current groups give the same `ResumePlan` and the same `ResumePlan.digest` on every rank.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .cautions import cautions
from .checkpoint import NOT_HYPERPARAMETERS, SavedOptimizer
from .errors import PlanError, PolicyError
from .phase import Phase
from .policy import SCHEDULE_KEYS, SCHEDULER_ATTRIBUTES, ResumePolicy
from .presets import Change

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
                [g.saved_index, {d.key: [d.taken, _plain(d.value)] for d in g.decisions}]
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


def plan_resume(
    policy: ResumePolicy,
    saved: SavedOptimizer,
    current_groups: Sequence[Mapping[str, Any]],
    circumstances: Circumstances | None = None,
    phase: Phase | None = None,
) -> ResumePlan:
    """Decide for every key of every current param_group.

    Args:
        policy: What the user asked, or what `phase` leaves of it.
        saved: The checkpoint's groups and step.
        current_groups: The live optimizer's param_groups as the current arguments made them.
            ``params`` and ``step`` are ignored.
        circumstances: What else the decisions and warnings depend on.
        phase: Whether a phase begins or goes on.

    Returns:
        The plan; nothing is changed.

    Raises:
        PlanError: A key to be kept is unknown, two saved groups fit one current group and differ
            in a key to be kept, or a preset cannot be carried out with these hyperparameters.
    """
    circumstances = circumstances or Circumstances()
    _check_known(policy, saved, current_groups)
    pairs = [_counterpart(policy, group, current_groups, saved.groups) for group in current_groups]
    used = {i for i, _ in pairs if i is not None}
    groups = tuple(
        _plan_group(policy, index, group, saved.groups, *pair)
        for index, (group, pair) in enumerate(zip(current_groups, pairs, strict=True))
    )
    clip_grad = None
    if not circumstances.live:
        clip_grad = _clip_grad(policy, circumstances)
    if circumstances.adam and not circumstances.live:
        groups = tuple(_derive(policy, group) for group in groups)
    if circumstances.adam:
        _refuse_coupled_decay(policy, groups, circumstances)
    step = _next_step(policy, saved.step) if circumstances.adam else saved.step
    plan = ResumePlan(
        groups=groups,
        step=step,
        unused_saved_groups=tuple(i for i in range(len(saved.groups)) if i not in used),
        policy=policy,
        saved_step=saved.step,
        clip_grad=clip_grad,
        phase=phase,
    )
    return replace(plan, warnings=cautions(plan, circumstances))


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
    return Decision(key, _plain(checkpoint), argument, taken, reason)


def _derive(policy: ResumePolicy, group: GroupPlan) -> GroupPlan:
    """Let the hyperparameters follow that a preset changes and that come from the arguments."""
    changes = {c.key: c for c in policy.preset.effect.changes}
    decisions = tuple(
        _changed(policy, d, changes[d.key])
        if d.key in changes and d.taken == "arguments" and d.argument is not None
        else d
        for d in group.decisions
    )
    return replace(group, decisions=decisions)


def _changed(policy: ResumePolicy, decision: Decision, change: Change) -> Decision:
    value = _plain(decision.argument)
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
    """L2 in the gradient is not scaled with the gradient."""
    decays = {d.value for g in groups for d in g.decisions if d.key == "weight_decay"}
    coupled = not circumstances.decoupled_weight_decay and any(decays)
    if policy.preset.name == "gradient-scale" and coupled:
        raise PlanError(
            f"preset {policy.preset}: weight decay is coupled (L2 in the gradient, "
            f"weight_decay {sorted(decays)}), and then Adam's update does change with the "
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


def _counterpart(
    policy: ResumePolicy,
    group: Mapping[str, Any],
    current_groups: Sequence[Mapping[str, Any]],
    saved_groups: Sequence[Mapping[str, Any]],
) -> tuple[int | None, str]:
    """Find the saved group a current group goes on from; ambiguity matters only for kept keys."""
    saved_keys = {k for g in saved_groups for k in g}
    kept = frozenset(k for k in saved_keys if policy.source(k, group)[0])
    # What is kept as one of all keys still tells groups apart; what is kept by name does not.
    by_name = kept & {*policy.named_keys, *SCHEDULE_KEYS}
    fit = _candidates(group, current_groups, saved_groups, by_name)
    if not fit:
        return None, "the checkpoint has no such group (added since)"
    for key in sorted(kept & {k for i in fit for k in saved_groups[i]}):
        values = [saved_groups[i].get(key, _ABSENT) for i in fit]
        if any(not _same(v, values[0]) for v in values[1:]):
            why = policy.source(key, group)[1]
            listing = "\n".join(f"  saved group {i}: {dict(saved_groups[i])}" for i in fit)
            raise PlanError(
                f"{why}: {len(fit)} saved param_groups fit the current group "
                f"{_identity(group)} and differ in {key!r}:\n{listing}\n"
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
