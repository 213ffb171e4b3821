"""The moments' part of a resume: from the plan to what the fused op does on this rank's shards.

Ranks that hold different parameters have to find the same statistics together, so they first tell
each other which ones their parameters need.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import agree
from .errors import CheckpointError, PlanError
from .layout import WHOLE
from .moment_plan import (
    ParameterPlan,
    plan_moments,
    unmatched,
    used_group_rules,
    used_rules,
)
from .moments import (
    MOMENT_KEYS,
    FillColumns,
    MomentShard,
    MomentStatistics,
    RangeRule,
    Statistics,
    Survey,
    survey,
    transform,
    values,
)
from .parameters import Shard, held_by, located, names_of, shards_of
from .plan import ResumePlan
from .policy import ResumePolicy
from .row_statistics import Value, find, pieces
from .rules import KEEP, ElementRule, Key, Statistic, registry, write
from .steps import is_adam, is_hybrid

#: Columns that are added up over the ranks, per moment.
_COLUMNS = ("square_sum_before", "square_sum_after", "elements", "nonfinite", "changed", "unread")
_AFTER, _CHANGED = _COLUMNS.index("square_sum_after"), _COLUMNS.index("changed")

_MAX_NAMED = 8
#: As many names a rule are told to the other ranks.
_NAMED_BY_RANK = 4


@dataclass(frozen=True)
class RuleReport:
    """What one rule did, on all ranks.

    Args:
        rule: As the policy has it; the preset for the elements no rule names.
        exp_avg: What was done to exp_avg.
        exp_avg_sq: What was done to exp_avg_sq.
        elements: Number of elements; one that several ranks hold counts on each.
        examples: Some of the parameters a rule of the policy met, by name.
    """

    rule: str
    exp_avg: str
    exp_avg_sq: str
    elements: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class MomentReport:
    """What was done to the moments of one Megatron optimizer, on all ranks.

    Args:
        rules: One each, and one for the preset.
        rms: For each moment its root mean square before and after.
        changed: For each moment the number of elements with another value than before.
        nonfinite: For each moment the number of NaN and infinite elements after.
        unread: For each moment the number of elements that were not read, because they are
            overwritten; the root mean square before and the number of changes are of the others.
        norms_on_this_rank: Euclidean norms of exp_avg and exp_avg_sq after.
        warnings: Rules that match nothing.
    """

    rules: tuple[RuleReport, ...]
    rms: Mapping[str, tuple[float | None, float]] = field(default_factory=dict)
    changed: Mapping[str, int] = field(default_factory=dict)
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    unread: Mapping[str, int] = field(default_factory=dict)
    norms_on_this_rank: tuple[float, float] = (0.0, 0.0)
    warnings: tuple[str, ...] = ()


def look(optimizer: Any) -> tuple[int, tuple[float, float] | None]:
    """Look at this rank's moments, in one pass that reads them.

    Returns:
        Number of NaN and infinite elements; Euclidean norms of exp_avg and exp_avg_sq, None where
        there are none.
    """
    found = _survey(optimizer)
    return (0, None) if found is None else (sum(found[1].nonfinite), found[1].norms)


def mend_nonfinite(
    optimizer: Any,
    model_chunks: Sequence[Any],
    choice: str,
    bad: Mapping[str, int] | None = None,
) -> str:
    """Refuse, reset or keep NaN and infinite moments; collective, called where some rank has any.

    Args:
        optimizer: A Megatron optimizer with state.
        model_chunks: Its model, for the names.
        choice: ``error``, ``reset`` or ``keep`` (`ResumePolicy.nonfinite`).
        bad: Parameters on this rank -> elements that are not finite, where that is known.

    Returns:
        What was done, for the report.

    Raises:
        CheckpointError: For ``error``, on every rank that has one.
        AgreementError: For ``error``, on the others, with the messages.
    """
    if bad is None:
        names = names_of(optimizer, model_chunks)
        bad = {names.get(i, "unnamed"): n for i, n in _nonfinite(optimizer).items() if n}
    error = None
    if bad and choice == "error":
        listing = ", ".join(f"{name}: {n}" for name, n in list(bad.items())[:_MAX_NAMED])
        more = f" and {len(bad) - _MAX_NAMED} more" if len(bad) > _MAX_NAMED else ""
        error = CheckpointError(
            f"the checkpoint's moments are not finite (elements of exp_avg and exp_avg_sq): "
            f"{listing}{more}. Load an earlier checkpoint, or pass --selective-nonfinite reset to "
            "set these elements to 0, or keep to go on with them"
        )
    agree.agree("looking at the moments", "0" * 32, error)
    if choice == "reset":
        _reset_nonfinite(optimizer)
    return f"not finite in the checkpoint: {'reset to 0' if choice == 'reset' else 'kept'}"


@dataclass(frozen=True)
class MomentWork:
    """What is to be done to one optimizer's moments on this rank.

    Args:
        policy: What the user asked.
        shards: This rank's.
        plans: By parameter name.
        used: Positions of the rules that match a parameter of the chain on this rank.
        used_groups: Positions of the group rules that fit one of its param_groups.
        kept: The optimizer is not Adam: its state is left alone.
        wanted: The statistics that some rank needs, the same list on every rank.
        shapes: The unsharded shapes of their parameters.
        unread: For each moment the parameters on this rank that it was not read of.
        warnings: Rules that match nothing on any rank.
        examples: For each rule some parameters that it matches, on all ranks.
    """

    policy: ResumePolicy
    shards: tuple[Shard, ...]
    plans: Mapping[str, ParameterPlan]
    used: frozenset[int]
    used_groups: frozenset[int] = frozenset()
    kept: bool = False
    wanted: tuple[Statistic, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    unread: Mapping[Key, frozenset[str]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    examples: tuple[tuple[str, ...], ...] = ()


def prepare(
    optimizer: Any,
    model_chunks: Sequence[Any],
    plan: ResumePlan,
    saved_groups: Sequence[Mapping[str, Any]],
    chain: Sequence[Any] = (),
    unread: Mapping[Key, frozenset[str]] | None = None,
) -> MomentWork | None:
    """Resolve a plan's rules against this rank's shards; nothing is changed, not collective.

    Args:
        optimizer: A Megatron optimizer.
        model_chunks: The model it was built for.
        plan: Its plan.
        saved_groups: The checkpoint's param_groups.
        chain: All optimizers that the policy is for; a rule has to match in one of them.
        unread: For each moment the parameters on this rank that it was not read of.

    Returns:
        None where the policy has no rules and keeps all moments.

    Raises:
        PlanError: A rule cannot be carried out.
        CheckpointError: A moment was not read that is not overwritten.
        HostError: The model does not say where its parameters lie.
    """
    policy, unread = plan.policy, unread or {}
    if not policy.overwrites_moments:
        _require_read(unread, {})
    if not (policy.decides_moments or policy.groups):
        return None
    chain = [o for o in chain or [optimizer] if o.optimizer is not None]
    used_groups = frozenset(
        used_group_rules(policy, [g for one in chain for g in one.optimizer.param_groups])
    )
    if not policy.decides_moments:
        return MomentWork(policy, (), {}, frozenset(), used_groups)
    members = chain if policy.rules else [o for o in chain if o is optimizer]
    of_members = _shards_by_optimizer(members, model_chunks)
    used = frozenset().union(
        *(
            used_rules(policy, (s.parameter for s in of_members[id(o)]), o.optimizer.param_groups)
            for o in members
        )
    )
    if optimizer.optimizer is None:
        return MomentWork(policy, (), {}, used, used_groups)
    shards = of_members[id(optimizer)]
    if not is_adam(optimizer.optimizer):
        _refuse_rules(policy, optimizer.optimizer, shards)
        return MomentWork(policy, (), {}, used, used_groups, kept=True)
    parameters = {s.parameter.name: s.parameter for s in shards}
    groups = optimizer.optimizer.param_groups
    plans = {
        p.parameter.name: p
        for p in plan_moments(plan, list(parameters.values()), saved_groups, groups)
    }
    _require_read(unread, plans)
    return MomentWork(policy, shards, plans, used, used_groups, unread=unread)


def _require_read(unread: Mapping[Key, frozenset[str]], plans: Mapping[str, ParameterPlan]) -> None:
    """Raise unless all that was not read is overwritten.

    With an empty `plans` nothing is overwritten.
    """
    for key, names in unread.items():
        for name in names if not plans else names & plans.keys():
            done = [getattr(rows, key) for rows in plans[name].rows] if plans else [KEEP]
            if any(rule.reads_old for rule in done):
                raise CheckpointError(
                    f"{key} of {name} was not read from the checkpoint, for it was to be "
                    f"overwritten, but now the plan is {done}; expected the same plan before and "
                    "after reading. The checkpoint was replaced while it was being read, or its "
                    "param_groups differ from its first ones; start again"
                )


def meet(work: MomentWork) -> MomentWork:
    """Tell the other ranks which rules matched and which statistics are needed; collective.

    One gather of plain values, and only where a rule or the preset's quantile asks for it.

    Raises:
        PlanError: A rule matches nothing on any rank (strict policies); on every rank.
    """
    policy, effect = work.policy, work.policy.preset.effect
    selects = effect.exp_avg.statistics or effect.exp_avg_sq.statistics
    if not policy.rules and not policy.groups and not selects:
        return work
    needed = {s: p.parameter.shape for p in work.plans.values() for s in p.statistics}
    examples = sorted(work.plans)
    ends = [*examples[:1], *examples[-1:]]
    mine = (needed, work.used, work.used_groups, ends, _met(work))
    of_ranks, used, used_groups, names, met = zip(*agree.gather(mine), strict=True)
    idle = unmatched(
        policy,
        frozenset().union(*used),
        frozenset().union(*used_groups),
        sorted({name for some in names for name in some}),
    )
    if idle and policy.strict:
        raise PlanError(f"{idle}. Mend the rule, or pass --no-selective-strict")
    return replace(
        work,
        wanted=tuple(sorted({s for needed in of_ranks for s in needed})),
        shapes={s.parameter: shape for needed in of_ranks for s, shape in needed.items()},
        warnings=(idle,) if idle else (),
        examples=tuple(
            tuple(sorted({name for some in of_rule for name in some})[:_MAX_NAMED])
            for of_rule in zip(*met, strict=True)
        ),
    )


def _met(work: MomentWork) -> list[list[str]]:
    """For each rule the first parameters on this rank that it matches."""
    return [
        [
            name
            for name, plan in sorted(work.plans.items())
            if any(rows.rule == number for rows in plan.rows)
        ][:_NAMED_BY_RANK]
        for number in range(len(work.policy.rules))
    ]


@dataclass(frozen=True)
class MomentChange:
    """What was done to the moments on this rank.

    Args:
        shards: Those with moments.
        counted: For each its statistics, by state key.
        device: Of the moments.
    """

    shards: tuple[Shard, ...]
    counted: tuple[Mapping[str, MomentStatistics], ...]
    device: torch.device

    @property
    def nonfinite_before(self) -> dict[str, int]:
        """Parameters that had NaN or infinite elements -> how many there are now.

        A sum of squares of fp32 values in float64 does not overflow: it is finite if they all are.
        """
        found: dict[str, int] = {}
        for shard, by_key in zip(self.shards, self.counted, strict=True):
            for s in by_key.values():
                if s.norm_before is not None and not math.isfinite(s.norm_before):
                    name = shard.parameter.name
                    found[name] = found.get(name, 0) + s.nonfinite
        return found


def change_unseen(work: MomentWork | None) -> MomentChange | None:
    """Change the moments without a look at them before, where one pass does for both.

    Where every element is kept or multiplied, what is not finite stays so, and the statistics of
    the change tell what a look would have told.

    Args:
        work: From `meet`; the moments have arrived.

    Returns:
        None where they have to be looked at first, or where nothing is to be done. A rank decides
        for itself: no collective follows from it.
    """
    if work is None or not _changes(work) or work.wanted or work.policy.nonfinite != "error":
        return None
    rules = (x for p in work.plans.values() for r in p.rows for x in (r.exp_avg, r.exp_avg_sq))
    if any(rule.multiplier is None for rule in rules):
        return None
    states = (s.inner.state[s.key] for s in work.shards if _has_moments(s))
    if any(state[key].dtype != torch.float32 for state in states for key in MOMENT_KEYS):
        return None
    return _change(work)


def carry_out(work: MomentWork, done: MomentChange | None = None) -> MomentReport | None:
    """Change the moments as planned; collective.

    The statistics that are needed are found together (`megatron_ext.row_statistics.find`), the
    fused op is called once a device, and one small reduction adds the report up.

    Args:
        work: From `meet`; the moments have arrived.
        done: From `change_unseen`: then only the report is left.

    Returns:
        None where there is nothing to do.
    """
    return _report(work, done or _change(work)) if _changes(work) else None


def _changes(work: MomentWork) -> bool:
    return not work.kept and work.policy.decides_moments


def _change(work: MomentWork) -> MomentChange:
    shards = tuple(s for s in work.shards if _has_moments(s))
    device = shards[0].inner.state[shards[0].key]["exp_avg"].device if shards else agree.device()
    found: dict[Statistic, Value] = {}
    if work.wanted:
        found = find(
            work.wanted,
            shards,
            lambda shard, key: values(shard.inner, shard.key, key),
            work.shapes,
            agree.add_up,
            device,
        )
    jobs = [_work(shard, work.plans[shard.parameter.name], found) for shard in shards]
    return MomentChange(shards, tuple(transform(jobs, Statistics.BEFORE_AND_AFTER)), device)


def _refuse_rules(policy: ResumePolicy, inner: Any, shards: Sequence[Shard]) -> None:
    """Raise if a rule is for a parameter that another optimizer than Adam updates."""
    for shard in shards:
        name, group = shard.parameter.name, inner.param_groups[shard.parameter.group]
        for rule in policy.rules:
            if rule.match.fits(name, len(shard.parameter.shape), group):
                raise PlanError(
                    f"rule {rule} matches {name}, which {type(inner).__name__} updates: it has no "
                    "Adam moments, and its state is kept. Narrow the rule, for example with "
                    "optimizer=adam"
                )


def _shards_by_optimizer(
    optimizers: Sequence[Any], model_chunks: Sequence[Any]
) -> dict[int, tuple[Shard, ...]]:
    """Id of an optimizer -> what it holds on this rank; one look at the model for all."""
    where = located(model_chunks) if optimizers else {}
    return {id(one): tuple(shards_of(one, model_chunks, where)) for one in optimizers}


def _work(shard: Shard, plan: ParameterPlan, found: Mapping[Statistic, Value]) -> MomentShard:
    """What the fused op is to do to a shard."""
    rules: list[RangeRule] = []
    for rows in plan.rows:
        m, v = (_rule(x, found) for x in (rows.exp_avg, rows.exp_avg_sq))
        if m == v == KEEP:
            continue
        by_position = any(isinstance(x, FillColumns) or x.kind == "positional" for x in (m, v))
        if len(plan.rows) == 1 and not by_position:
            # One range: a rescale of a scaled moment is then a change of its scale.
            rules.append(RangeRule(0, shard.end - shard.begin, m, v, WHOLE))
            continue
        for run in pieces(shard, ((rows.first, rows.last),)):
            rules.append(RangeRule(run.begin, run.end, m, v, run.index))
    rules.sort(key=lambda r: r.begin)
    return MomentShard(shard.parameter.name, shard.inner, shard.key, tuple(rules))


def _rule(
    decided: ElementRule | Statistic, found: Mapping[Statistic, Value]
) -> ElementRule | FillColumns:
    if not isinstance(decided, Statistic):
        return decided
    value = found[decided]
    if isinstance(value, torch.Tensor):
        return FillColumns(value)
    return registry.of_statistic(decided, value)


def _report(work: MomentWork, done: MomentChange) -> MomentReport:
    policy = work.policy
    sums = [[0.0] * len(_COLUMNS) for _ in MOMENT_KEYS]
    elements = [0.0] * (len(policy.rules) + 1)
    unread = {str(key): names for key, names in work.unread.items()}
    for shard, statistics in zip(done.shards, done.counted, strict=True):
        for row, key in zip(sums, MOMENT_KEYS, strict=True):
            s = statistics[key]
            found = ((s.norm_before or 0.0) ** 2, s.norm_after**2, shard.end - shard.begin)
            for i, value in enumerate((*found, s.nonfinite, s.changed or 0)):
                row[i] += value
            if shard.parameter.name in unread.get(key, frozenset()):
                held = shard.end - shard.begin
                row[-1] += held
                row[_CHANGED] -= s.changed or 0
        for rows in work.plans[shard.parameter.name].rows:
            held = sum(p.end - p.begin for p in pieces(shard, ((rows.first, rows.last),)))
            elements[-1 if rows.rule is None else rows.rule] += held
    mine = (math.sqrt(sums[0][_AFTER]), math.sqrt(sums[1][_AFTER]))
    flat = torch.tensor([*sums[0], *sums[1], *elements], dtype=torch.float64, device=done.device)
    agree.add_up(flat)
    total = flat.tolist()
    by_key = {
        key: dict(zip(_COLUMNS, total[i * len(_COLUMNS) :], strict=False))
        for i, key in enumerate(MOMENT_KEYS)
    }
    reports = tuple(
        RuleReport(name, write(m), write(v), int(n), met)
        for (name, m, v), n, met in zip(
            policy.told_rules, total[2 * len(_COLUMNS) :], [*work.examples, ()], strict=True
        )
    )
    return MomentReport(
        rules=reports,
        rms={
            key: (
                _rms(c["square_sum_before"], c["elements"] - c["unread"]),
                _rms(c["square_sum_after"], c["elements"]) or 0.0,
            )
            for key, c in by_key.items()
        },
        changed={key: int(c["changed"]) for key, c in by_key.items()},
        nonfinite={key: int(c["nonfinite"]) for key, c in by_key.items()},
        unread={key: int(c["unread"]) for key, c in by_key.items()},
        norms_on_this_rank=mine,
        warnings=work.warnings,
    )


def _rms(square_sum: float, elements: float) -> float | None:
    return math.sqrt(square_sum / elements) if elements else None


def _has_moments(shard: Shard) -> bool:
    return all(key in shard.inner.state.get(shard.key, {}) for key in MOMENT_KEYS)


def _survey(optimizer: Any) -> tuple[list[torch.Tensor], Survey] | None:
    """The keys of the state, and their moments."""
    inner = optimizer.optimizer
    if inner is None or not is_adam(inner) or is_hybrid(inner):
        return None
    keys = [k for k, state in inner.state.items() if all(m in state for m in MOMENT_KEYS)]
    return keys, survey(inner, keys)


def _nonfinite(optimizer: Any) -> dict[int, int]:
    """Id of each state's key -> number of elements that are not finite."""
    found = _survey(optimizer)
    return (
        {}
        if found is None
        else {id(k): n for k, n in zip(found[0], found[1].nonfinite, strict=True)}
    )


@torch.no_grad()
def _reset_nonfinite(optimizer: Any) -> None:
    bad = {i for i, n in _nonfinite(optimizer).items() if n}
    inner = optimizer.optimizer
    for held in held_by(optimizer):
        if id(held.key) not in bad:
            continue
        moments = {k: values(inner, held.key, k) for k in MOMENT_KEYS}
        wrong = ~(moments["exp_avg"].isfinite() & moments["exp_avg_sq"].isfinite())
        for key, found in moments.items():
            found.masked_fill_(wrong, 0.0)
            if found.data_ptr() != inner.state[held.key][key].data_ptr():
                inner.set_scaled_state(held.key, key, found)
