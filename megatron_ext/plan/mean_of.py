"""Find the parameters from which `fill mean-of` takes its mean. Pure.

A rank knows only its own parameters: `offer` says what they give to a mean, and `sources_of` joins
the offers of all ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from ..base.patterns import compiled
from ..base.text import first_of
from ..errors import PlanError
from ..policy.policy import ResumePolicy
from ..rules.base import Statistic
from ..rules.form import MOMENTS
from ..rules.mean_of import MeanOf
from .parameters import ParameterPlan

#: The means of single parameters, each with its number of elements: they make up one of several.
Parts = Mapping[Statistic, int]


@dataclass(frozen=True)
class Offer:
    """What some parameters give to one mean of several parameters.

    Args:
        parts: Their means, with the numbers of elements of the unsharded parameters.
        refused: The name of each parameter that matches but cannot count -> the reason.
        elsewhere: The names of matching parameters that another optimizer of the chain updates.
    """

    parts: Parts = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    elsewhere: tuple[str, ...] = ()


def means_of(policy: ResumePolicy) -> tuple[Statistic, ...]:
    """List the means of several parameters that a policy's rules name, each once."""
    named = ((key, getattr(rule, key)) for rule in policy.rules for key in MOMENTS)
    return tuple(
        dict.fromkeys(
            Statistic(rule.pattern, key, "mean-of", ())
            for key, rule in named
            if isinstance(rule, MeanOf)
        )
    )


def offer(
    wanted: Statistic,
    plans: Iterable[ParameterPlan],
    new: Collection[str] = (),
    elsewhere: Iterable[str] = (),
) -> Offer:
    """Find what some parameters give to a mean.

    Args:
        wanted: A mean of several parameters.
        plans: The plans of parameters of the optimizer that needs it.
        new: The names of parameters that are new to the optimizers: their moments start at 0.
        elsewhere: The names of parameters that other optimizers of the chain update.
    """
    fits = compiled(wanted.parameter)
    parts: dict[Statistic, int] = {}
    refused = dict.fromkeys(filter(fits, new), "new to the optimizer")
    for plan in plans:
        name = plan.parameter.name
        if not fits(name) or name in refused:
            continue
        if reason := _reason(wanted, plan):
            refused[name] = reason
        else:
            parts.update(_parts(wanted, plan))
    return Offer(parts, refused, tuple(sorted(filter(fits, elsewhere))))


def sources_of(wanted: Statistic, offers: Sequence[Offer], names: Sequence[str]) -> Parts:
    """Join what all ranks offer to a mean.

    Args:
        wanted: A mean of several parameters.
        offers: One of each rank.
        names: Some parameter names, as examples.

    Returns:
        The means of its parameters, in the same order on every rank.

    Raises:
        PlanError: A matching parameter cannot count, or none matches.
    """
    what = f"fill mean-of {wanted.parameter} for {wanted.key}"
    elsewhere = sorted({name for one in offers for name in one.elsewhere})
    if elsewhere:
        raise PlanError(
            f"{what}: another optimizer of the chain updates {first_of(elsewhere)}; expected "
            "parameters of the optimizer that updates what the rule fills. Narrow the pattern"
        )
    refused = sorted({item for one in offers for item in one.refused.items()})
    if refused:
        raise PlanError(
            f"{what}: expected parameters whose {wanted.key} is kept or scaled; found "
            f"{first_of([f'{name} ({reason})' for name, reason in refused])}. Exclude them in the "
            "pattern, for example with re: and (?!...)"
        )
    parts = dict(sorted(chain.from_iterable(one.parts.items() for one in offers)))
    if not parts:
        raise PlanError(
            f"{what} matches no parameter that holds moments. Names look like "
            f"{', '.join(names[:3]) or '(none)'}. Correct the pattern"
        )
    return parts


def _reason(wanted: Statistic, plan: ParameterPlan) -> str:
    """Say why a parameter's moment is not what the checkpoint gave; empty if it is."""
    for rows in plan.rows:
        done = getattr(rows, wanted.key)
        if done.multiplier is None and plan.parameter.old([(rows.first, rows.last)]):
            if done == wanted:
                return "this rule sets it itself"
            return "changed by " + ("the preset" if rows.rule is None else "another rule")
    return ""


def _parts(wanted: Statistic, plan: ParameterPlan) -> Parts:
    """Return the means of the rows that the checkpoint has, one for each factor."""
    spans: dict[float, list[tuple[int, int]]] = {}
    for rows in plan.rows:
        if old := plan.parameter.old([(rows.first, rows.last)]):
            spans.setdefault(getattr(rows, wanted.key).multiplier, []).extend(old)
    width = plan.parameter.row_elements
    return {
        Statistic(plan.parameter.name, wanted.key, "mean", tuple(of_factor), factor=factor): width
        * sum(last - first for first, last in of_factor)
        for factor, of_factor in spans.items()
    }
