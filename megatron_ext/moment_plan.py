"""Decide for every row of every parameter what is done to its moments. Pure.

Rules are resolved on unsharded parameters: the same on every layout, and offline. What needs a
number that only the state itself has (a mean, a quantile) is left as a `Statistic` to be found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .errors import PlanError
from .plan import ResumePlan
from .policy import MomentRule, ResumePolicy
from .rules import KEEP, ElementRule, Key, Rule, Statistic


@dataclass(frozen=True)
class Parameter:
    """One unsharded parameter.

    Args:
        name: Global name.
        shape: Unsharded.
        group: Position of its param_group in the current optimizer.
        saved_rows: Its rows in the checkpoint, where they are more or fewer.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    saved_rows: int | None = None

    @property
    def rows(self) -> int:
        """Length of dimension 0; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape[1:])

    @property
    def grown(self) -> bool:
        """Whether it has rows that the checkpoint has not."""
        return self.saved_rows is not None and self.saved_rows < self.rows

    def old(self, spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """The parts of some row ranges that the checkpoint has; a new row's moments say nothing."""
        end = self.rows if self.saved_rows is None else min(self.saved_rows, self.rows)
        return tuple((first, min(last, end)) for first, last in spans if first < end)


@dataclass(frozen=True)
class Rows:
    """What is done to some rows of a parameter.

    Args:
        first: First row.
        last: One past the last.
        exp_avg: An element rule, or the statistic that gives one.
        exp_avg_sq: The same.
        rule: Position of the policy's rule, or None for its preset.
    """

    first: int
    last: int
    exp_avg: ElementRule | Statistic
    exp_avg_sq: ElementRule | Statistic
    rule: int | None


@dataclass(frozen=True)
class ParameterPlan:
    """What is done to one unsharded parameter; the rows follow each other without a gap."""

    parameter: Parameter
    rows: tuple[Rows, ...]

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """What has to be known first."""
        both = (x for r in self.rows for x in (r.exp_avg, r.exp_avg_sq))
        return tuple(dict.fromkeys(x for x in both if isinstance(x, Statistic)))


def plan_moments(
    plan: ResumePlan,
    parameters: Sequence[Parameter],
    saved_groups: Sequence[Mapping[str, Any]],
    current_groups: Sequence[Mapping[str, Any]],
) -> tuple[ParameterPlan, ...]:
    """Decide what is done to the moments of some parameters.

    Args:
        plan: The plan of the optimizer they belong to.
        parameters: Some of its parameters; what is decided for one does not depend on the others.
        saved_groups: The checkpoint's param_groups, for the betas of the moments.
        current_groups: The current ones, for the attributes that rules match.

    Returns:
        One plan for each parameter.

    Raises:
        PlanError: Two rules meet in an element, rows that a parameter does not have, or a rule
            that this checkpoint cannot be changed by. Names rules and parameter.
    """
    return tuple(_plan(plan, p, saved_groups, current_groups[p.group]) for p in parameters)


def overwritten(
    policy: ResumePolicy, parameter: Parameter, group: Mapping[str, Any] | None
) -> frozenset[Key]:
    """The moments of a parameter that are set in all its rows without a look at the old values.

    Args:
        policy: What is asked.
        parameter: Its `saved_rows` do not matter.
        group: Its current param_group; None where it is not known, and then no rule that asks for
            attributes of it counts as one that overwrites.

    Returns:
        Empty too where the rules contradict each other: `plan_moments` raises there.
    """
    if group is None and any(rule.match.group for rule in policy.rules):
        return frozenset()
    try:
        rows = _operations(policy, parameter, group or {})
    except PlanError:
        return frozenset()
    by_key: dict[Key, list[Rule]] = {
        "exp_avg": [m for _, _, m, _, _ in rows],
        "exp_avg_sq": [v for _, _, _, v, _ in rows],
    }
    return frozenset(k for k, done in by_key.items() if not any(o.reads_old for o in done))


def used_rules(
    policy: ResumePolicy, parameters: Iterable[Parameter], groups: Sequence[Mapping[str, Any]]
) -> set[int]:
    """Positions of the rules that match one of some parameters.

    Args:
        policy: Whose rules.
        parameters: Of one optimizer.
        groups: Its param_groups.
    """
    used: set[int] = set()
    for parameter in parameters:
        name, dimensions, group = parameter.name, len(parameter.shape), groups[parameter.group]
        for number, rule in enumerate(policy.rules):
            if number not in used and rule.match.fits(name, dimensions, group):
                used.add(number)
    return used


def used_group_rules(policy: ResumePolicy, groups: Sequence[Mapping[str, Any]]) -> set[int]:
    """Positions of the group rules that fit one of some param_groups."""
    return {i for i, rule in enumerate(policy.groups) if any(map(rule.fits, groups))}


def unmatched(
    policy: ResumePolicy,
    used: Collection[int],
    used_groups: Collection[int],
    names: Sequence[str],
) -> str:
    """What to say of rules that match nothing; empty if all match something.

    Args:
        policy: Whose rules.
        used: Positions of the rules that match a parameter, on any rank.
        used_groups: Positions of the group rules that fit a param_group, on any rank.
        names: Some names that parameters have.
    """
    idle = [rule for i, rule in enumerate(policy.rules) if i not in used]
    out = []
    if idle:
        out.append(
            f"{len(idle)} of {len(policy.rules)} rules match no parameter that holds moments: "
            + "; ".join(f"rule {rule}" for rule in idle)
            + f". Names look like {', '.join(names[:3]) or '(none)'}"
        )
    out += [
        f"group rule {str(rule)!r} fits no param_group"
        for i, rule in enumerate(policy.groups)
        if i not in used_groups
    ]
    return ". ".join(out)


def _plan(
    plan: ResumePlan,
    parameter: Parameter,
    saved_groups: Sequence[Mapping[str, Any]],
    group: Mapping[str, Any],
) -> ParameterPlan:
    rows = _operations(plan.policy, parameter, group)
    of_exp_avg = tuple((a, b, m, n) for a, b, m, _, n in rows)
    of_exp_avg_sq = tuple((a, b, v, n) for a, b, _, v, n in rows)
    out = []
    for first, last, exp_avg, exp_avg_sq, chosen in rows:
        context = PlanContext(plan, parameter, saved_groups, "exp_avg", of_exp_avg, chosen)
        m = exp_avg.resolve(context)
        context = replace(context, key="exp_avg_sq", rows=of_exp_avg_sq)
        v = exp_avg_sq.resolve(context)
        if isinstance(v, ElementRule) and v.kind == "joint" and m != KEEP:
            raise context.error(
                f"the {v.name.replace('_', '-')} rule for exp_avg_sq reads exp_avg, which must be "
                "kept. Do the two in two steps"
            )
        out.append(Rows(first, last, m, v, chosen))
    return ParameterPlan(parameter, tuple(out))


def _operations(
    policy: ResumePolicy, parameter: Parameter, group: Mapping[str, Any]
) -> list[tuple[int, int, Rule, Rule, int | None]]:
    """First row and one past the last, what is done to both moments, and which rule says so."""
    rules = policy.rules
    pieces: list[tuple[int, int, int]] = []
    for number, rule in enumerate(rules):
        if rule.match.fits(parameter.name, len(parameter.shape), group):
            pieces.append((*_rows(rule, parameter), number))
    pieces.sort()
    for (_, last, one), (first, end, two) in itertools.pairwise(pieces):
        if first < last:
            raise PlanError(
                f"rules {rules[one]} and {rules[two]} both apply to {parameter.name}, rows {first} "
                f"to {min(last, end) - 1}; expected one. Narrow one of them"
            )
    effect = policy.preset.effect
    rows: list[tuple[int, int, Rule, Rule, int | None]] = []
    at = 0
    for first, last, number in [*pieces, (parameter.rows, parameter.rows, -1)]:
        if at < first:
            rows.append((at, first, effect.exp_avg, effect.exp_avg_sq, None))
        if first < last:
            rule = rules[number]
            rows.append((first, last, rule.exp_avg, rule.exp_avg_sq, number))
        at = max(at, last)
    return rows


def _rows(rule: MomentRule, parameter: Parameter) -> tuple[int, int]:
    if rule.match.rows is None:
        return 0, parameter.rows
    first, last = rule.match.rows
    first, last = first or 0, parameter.rows if last is None else last
    if not parameter.shape or first >= parameter.rows or last > parameter.rows:
        raise PlanError(
            f"rule {rule}: {parameter.name} has shape {parameter.shape}, so no rows {first}:{last}"
            f"; expected rows within 0:{parameter.rows if parameter.shape else 0}"
        )
    return first, last


@dataclass(frozen=True)
class PlanContext:
    """`megatron_ext.rules.base.Context`, for one rule and one moment of one parameter.

    Args:
        plan: Of the optimizer.
        parameter: Whose moment.
        saved_groups: The checkpoint's param_groups.
        key: Which moment.
        rows: All rows of the parameter: first, one past the last, what is done to the moment, and
            the position of the policy's rule.
        number: Position of the rule that is resolved, None for the preset.
    """

    plan: ResumePlan
    parameter: Parameter
    saved_groups: Sequence[Mapping[str, Any]]
    key: Key
    rows: tuple[tuple[int, int, Rule, int | None], ...]
    number: int | None

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.parameter.name

    @property
    def saved_step(self) -> int | None:
        """T of the moments."""
        return self.plan.saved_step

    @property
    def next_step(self) -> int | None:
        """T after the resume."""
        return self.plan.step

    def error(self, text: str) -> PlanError:
        """An error that names the rule and the parameter."""
        policy = self.plan.policy
        chosen = self.number
        rule = f"preset {policy.preset}" if chosen is None else f"rule {policy.rules[chosen]}"
        return PlanError(f"{rule}, {self.name}: {text}")

    def step(self) -> int:
        """T of the moments, at least 1."""
        t = self.plan.saved_step
        if not t:
            raise self.error(
                "the checkpoint was written before the first step, so its moments are 0 and say "
                "nothing about the gradient. Leave the rule out"
            )
        return t

    def saved_betas(self) -> tuple[float, float]:
        """b1 and b2 with which the moments were made."""
        index = self.plan.groups[self.parameter.group].saved_index
        found = [self.saved_groups[index]] if index is not None else list(self.saved_groups)
        betas = {tuple(float(b) for b in g["betas"]) for g in found if g.get("betas") is not None}
        if len(betas) != 1:
            raise self.error(
                "needs the betas of the checkpoint; the parameter's group has no counterpart there "
                f"and the saved groups have {sorted(betas) or 'none'}"
            )
        b1, b2 = betas.pop()
        return b1, b2

    def next_betas(self) -> tuple[float, float]:
        """b1 and b2 after the resume."""
        betas = self.plan.groups[self.parameter.group].values.get("betas")
        if betas is None:
            raise self.error("needs betas, and its param_group has none")
        b1, b2 = betas
        return float(b1), float(b2)

    def own_rows(self) -> tuple[tuple[int, int], ...]:
        """The rows that the rule is for and the checkpoint has."""
        return self.parameter.old([(a, b) for a, b, _, other in self.rows if other == self.number])

    def kept_rows(self, text: str) -> tuple[tuple[tuple[int, int], ...], float]:
        """The rows that are kept or scaled, and their factor; all where one rule has them all."""
        if len(self.rows) == 1:
            return self.parameter.old([(0, self.parameter.rows)]), 1.0
        spans, factors = [], set()
        for first, last, rule, number in self.rows:
            if rule.statistics:
                continue
            found = rule.resolve(replace(self, number=number))
            if found.multiplier is not None and self.parameter.old([(first, last)]):
                spans.append((first, last))
                factors.add(found.multiplier)
        if not spans:
            raise self.error(
                f"{text!r} needs rows that are kept or scaled, and {self.name} has none"
                f"{' that the checkpoint has' if self.parameter.grown else ''}. Fill with a "
                "number, or keep some rows"
            )
        if len(factors) > 1:
            raise self.error(
                f"{text!r}: the other rows are scaled by different factors, {sorted(factors)}; "
                "expected one. Do it in two steps"
            )
        return self.parameter.old(spans), factors.pop()
