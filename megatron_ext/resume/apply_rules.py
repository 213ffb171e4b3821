"""Apply a plan's moment rules to this rank's shards, and report what they did on all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .._ops.segments import Statistics
from ..base import ranks
from ..base.placement import WHOLE
from ..plan.parameters import ParameterPlan
from ..report.model import MomentReport, RuleReport
from ..rules import registry
from ..rules.base import ElementRule, Statistic
from ..rules.elementwise import KEEP
from ..rules.registry import write
from .moments import MomentStatistics, transform
from .nonfinite import Unusable, unusable_of
from .parameters import Shard
from .prepare_rules import MomentWork
from .scaled import values
from .shard_rules import FillColumns, MomentShard, RangeRule
from .statistics import Value, compute_statistics, runs_of_rows

#: Columns that are summed over the ranks, for each moment.
_COLUMNS = (
    *("square_sum_before", "square_sum_after", "elements", "nonfinite", "changed"),
    *("unread", "unread_shards"),
)
_AFTER, _CHANGED = _COLUMNS.index("square_sum_after"), _COLUMNS.index("changed")
_UNREAD, _UNREAD_SHARDS = _COLUMNS.index("unread"), _COLUMNS.index("unread_shards")


@dataclass(frozen=True)
class AppliedRules:
    """The statistics of a change of this rank's moments.

    Args:
        shards: The shards that have moments.
        counted: The statistics of each shard, by state key.
        device: The device of the moments.
    """

    shards: tuple[Shard, ...]
    counted: tuple[Mapping[str, MomentStatistics], ...]
    device: torch.device

    @property
    def unusable_before(self) -> dict[str, Unusable]:
        """Map each parameter that had elements that cannot be used to these, after the change.

        A float64 sum of squares of fp32 values does not overflow: it is finite if all values are.
        A negative element of a second moment was negative before, because no factor of it is.
        """
        found: dict[str, Unusable] = {}
        for shard, by_key in zip(self.shards, self.counted, strict=True):
            if not any(s.nonfinite for s in by_key.values()):
                continue
            now = unusable_of(shard.inner, shard.key)
            norms = {key: by_key[key].norm_before for key in now.nonfinite}
            spoilt = {
                k for k, norm in norms.items() if norm is not None and not math.isfinite(norm)
            }
            before = Unusable({k: n for k, n in now.nonfinite.items() if k in spoilt}, now.negative)
            if before.total:
                found[shard.parameter.name] = before
        return found


def apply_in_one_pass(work: MomentWork | None) -> AppliedRules | None:
    """Apply rules that cannot hide a NaN (keep, scale) in the pass that counts non-finite values.

    If every element is kept or multiplied, a non-finite value stays non-finite. The statistics of
    the change then give the same count as a separate pass.

    Args:
        work: The result of `exchange_with_ranks`. The moments have been loaded.

    Returns:
        None if the non-finite values have to be counted first, or if no moment changes. Each rank
        decides alone, because no collective depends on the decision.
    """
    if work is None or not _changes(work) or work.wanted or work.policy.nonfinite != "error":
        return None
    rules = (x for p in work.plans.values() for r in p.rows for x in (r.exp_avg, r.exp_avg_sq))
    if any(rule.multiplier is None for rule in rules):
        return None
    states = (s.inner.state[s.key] for s in work.shards if s.has_moments)
    tensors = work.optimizer.tensors
    if any(state[key].dtype != torch.float32 for state in states for key in tensors):
        return None
    return _change(work)


def apply_rules(work: MomentWork, done: AppliedRules | None = None) -> MomentReport | None:
    """Change the moments as planned; collective.

    The ranks compute the statistics together (`compute_statistics`). Each device then gets one
    call of the fused op, and one small reduction sums the report.

    Args:
        work: The result of `exchange_with_ranks`. The moments have been loaded.
        done: The result of `apply_in_one_pass`. If it is given, only the report is made.

    Returns:
        None if no moment changes.
    """
    return _report(work, done or _change(work)) if _changes(work) else None


def _changes(work: MomentWork) -> bool:
    return bool(work.optimizer.moments) and work.policy.decides_moments


def _change(work: MomentWork) -> AppliedRules:
    shards = tuple(s for s in work.shards if s.has_moments)
    first = work.optimizer.tensors[0]
    device = shards[0].inner.state[shards[0].key][first].device if shards else ranks.device()
    found: dict[Statistic, Value] = {}
    if work.wanted:
        found = compute_statistics(
            work.wanted,
            shards,
            lambda shard, key: values(shard.inner, shard.key, shard.state.tensor(key) or key),
            work.shapes,
            ranks.sum_over_ranks,
            device,
            work.sources,
        )
    jobs = [_work(shard, work.plans[shard.parameter.name], found) for shard in shards]
    return AppliedRules(shards, tuple(transform(jobs, Statistics.BEFORE_AND_AFTER)), device)


def _work(shard: Shard, plan: ParameterPlan, found: Mapping[Statistic, Value]) -> MomentShard:
    """Build the ranges and rules of a shard for the fused op."""
    rules: list[RangeRule] = []
    for rows in plan.rows:
        m, v = (_rule(x, found) for x in (rows.exp_avg, rows.exp_avg_sq))
        if m == v == KEEP:
            continue
        by_position = any(isinstance(x, FillColumns) or x.kind == "positional" for x in (m, v))
        if len(plan.rows) == 1 and not by_position:
            # With a single range, a rescale of a scaled moment only changes its scale.
            rules.append(RangeRule(0, shard.end - shard.begin, m, v, WHOLE))
            continue
        for run in runs_of_rows(shard, ((rows.first, rows.last),)):
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


def _report(work: MomentWork, done: AppliedRules) -> MomentReport:
    policy = work.policy
    tensors = work.optimizer.tensors
    sums = [[0.0] * len(_COLUMNS) for _ in tensors]
    elements = [0.0] * (len(policy.rules) + 1)
    unread = {work.optimizer.tensor(key): names for key, names in work.unread.items()}
    for shard, statistics in zip(done.shards, done.counted, strict=True):
        for row, key in zip(sums, tensors, strict=True):
            s = statistics[key]
            found = ((s.norm_before or 0.0) ** 2, s.norm_after**2, shard.end - shard.begin)
            for i, value in enumerate((*found, s.nonfinite, s.changed or 0)):
                row[i] += value
            if shard.parameter.name in unread.get(key, frozenset()):
                held = shard.end - shard.begin
                row[_UNREAD] += held
                row[_UNREAD_SHARDS] += 1
                row[_CHANGED] -= s.changed or 0
        for rows in work.plans[shard.parameter.name].rows:
            held = sum(p.end - p.begin for p in runs_of_rows(shard, ((rows.first, rows.last),)))
            elements[-1 if rows.rule is None else rows.rule] += held
    mine = tuple(math.sqrt(row[_AFTER]) for row in sums)
    numbers = [x for row in (*sums, elements) for x in row]
    flat = torch.tensor(numbers, dtype=torch.float64, device=done.device)
    ranks.sum_over_ranks(flat)
    total = flat.tolist()
    by_key = {
        key: dict(zip(_COLUMNS, total[i * len(_COLUMNS) :], strict=False))
        for i, key in enumerate(tensors)
    }
    reports = tuple(
        RuleReport(name, write(m), write(v), int(n), met)
        for (name, m, v), n, met in zip(
            policy.described_rules,
            total[len(tensors) * len(_COLUMNS) :],
            [*work.examples, ()],
            strict=True,
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
        unread_shards={key: int(c["unread_shards"]) for key, c in by_key.items()},
        norms_on_this_rank=mine,
        warnings=work.warnings,
    )


def _rms(square_sum: float, elements: float) -> float | None:
    return math.sqrt(square_sum / elements) if elements else None
