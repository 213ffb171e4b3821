"""Decide the moment rules for every row of every parameter. Pure.

Rules are resolved on unsharded parameters, so the result is the same for every parallel layout and
offline. A rule that needs a number from the state itself (a mean, a quantile) stays a `Statistic`
that is computed later.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PlanError
from ..rules.base import ElementRule, Rule
from ..rules.elementwise import KEEP
from ..rules.form import MOMENTS, Key
from .decisions import ResumePlan
from .matching import operations_of
from .parameters import Parameter, ParameterPlan, Rows


def plan_moments(
    plan: ResumePlan,
    parameters: Sequence[Parameter],
    saved_groups: Sequence[Mapping[str, Any]],
    current_groups: Sequence[Mapping[str, Any]],
) -> tuple[ParameterPlan, ...]:
    """Decide the rules for the moments of some parameters.

    Args:
        plan: The plan of their optimizer.
        parameters: Some of its parameters. Each is decided independently of the others.
        saved_groups: The checkpoint's param_groups, for the betas of the moments.
        current_groups: The current ones, for the attributes that rules match.

    Returns:
        One plan for each parameter.

    Raises:
        PlanError: Two rules cover the same element, a rule names rows that a parameter does not
            have, or it cannot be applied to this checkpoint. The error names rules and parameter.
    """
    return tuple(_plan(plan, p, saved_groups, current_groups[p.group]) for p in parameters)


def _plan(
    plan: ResumePlan,
    parameter: Parameter,
    saved_groups: Sequence[Mapping[str, Any]],
    group: Mapping[str, Any],
) -> ParameterPlan:
    rows = operations_of(plan.policy, parameter, group, plan.optimizer)
    of_exp_avg = tuple((a, b, m, n) for a, b, m, _, n in rows)
    of_exp_avg_sq = tuple((a, b, v, n) for a, b, _, v, n in rows)
    out = []
    for first, last, exp_avg, exp_avg_sq, chosen in rows:
        context = PlanContext(plan, parameter, saved_groups, "exp_avg", of_exp_avg, chosen)
        m = exp_avg.resolve(context)
        context = replace(context, key="exp_avg_sq", rows=of_exp_avg_sq)
        v = exp_avg_sq.resolve(context)
        for key, rule in zip(MOMENTS, (m, v), strict=True):
            if isinstance(rule, ElementRule) and rule.overflow:
                raise context.error(f"{key}: {rule.overflow}")
        if isinstance(v, ElementRule) and v.kind == "joint" and m != KEEP:
            raise context.error(
                f"the {v.name.replace('_', '-')} rule for exp_avg_sq reads exp_avg, which must be "
                "kept. Apply the two rules in two resumes"
            )
        out.append(Rows(first, last, m, v, chosen))
    return ParameterPlan(parameter, tuple(out))


@dataclass(frozen=True)
class PlanContext:
    """`megatron_ext.rules.base.Context`, for one rule and one moment of one parameter.

    Args:
        plan: The plan of the optimizer.
        parameter: The parameter.
        saved_groups: The checkpoint's param_groups.
        key: The moment, ``exp_avg`` or ``exp_avg_sq``.
        rows: All rows of the parameter: first row, one past the last, the moment's rule, and the
            rule's position in the policy.
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
        """Step t of the saved moments."""
        return self.plan.saved_step

    @property
    def next_step(self) -> int | None:
        """Step t after the resume."""
        return self.plan.step

    def error(self, text: str) -> PlanError:
        """Make an error that names the rule and the parameter."""
        policy = self.plan.policy
        chosen = self.number
        rule = f"preset {policy.preset}" if chosen is None else f"rule {policy.rules[chosen]}"
        return PlanError(f"{rule}, {self.name}: {text}")

    def step(self) -> int:
        """Return step t of the saved moments, at least 1."""
        t = self.plan.saved_step
        if not t:
            raise self.error(
                "the checkpoint was written before the first step, so its moments are 0 and hold "
                "no information about the gradient. Leave the rule out"
            )
        return t

    def saved_betas(self) -> tuple[float, float]:
        """Return b1 and b2 of the saved moments."""
        index = self.plan.groups[self.parameter.group].saved_index
        found = [self.saved_groups[index]] if index is not None else list(self.saved_groups)
        betas = {tuple(float(b) for b in g["betas"]) for g in found if g.get("betas") is not None}
        if len(betas) != 1:
            raise self.error(
                "it needs the betas of the checkpoint, but the parameter's group has no "
                f"counterpart there and the saved groups have {sorted(betas) or 'none'}"
            )
        b1, b2 = betas.pop()
        return b1, b2

    def next_betas(self) -> tuple[float, float]:
        """Return b1 and b2 after the resume."""
        betas = self.plan.groups[self.parameter.group].values.get("betas")
        if betas is None:
            raise self.error("it needs betas, but its param_group has none")
        b1, b2 = betas
        return float(b1), float(b2)

    def own_rows(self) -> tuple[tuple[int, int], ...]:
        """Return the rows that the rule covers and the checkpoint has."""
        return self.parameter.old([(a, b) for a, b, _, other in self.rows if other == self.number])

    def kept_rows(self, text: str) -> tuple[tuple[tuple[int, int], ...], float]:
        """Return the kept or scaled rows and their factor; all rows if one rule covers them."""
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
                "expected one. Apply the rules in two resumes"
            )
        return self.parameter.old(spans), factors.pop()
