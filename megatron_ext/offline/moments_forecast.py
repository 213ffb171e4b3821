"""Assign rules to the rows of parameters, from a checkpoint's index. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from ..checkpoint.stored import StoredCheckpoint
from ..errors import MegatronExtError, PlanError
from ..plan.decisions import ResumePlan
from ..plan.matching import unmatched, used_group_rules, used_rules
from ..plan.mean_of import means_of, offer, sources_of
from ..plan.moments import plan_moments
from ..plan.parameters import Parameter, ParameterPlan
from ..policy.policy import ResumePolicy
from ..rules.registry import write
from .current_groups import CurrentGroups
from .stored_parameters import Stored, in_groups

#: Number of parameter names that are shown for a rule.
_EXAMPLES = 5

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RuleForecast:
    """The elements that one rule covers.

    Args:
        rule: Its match, or the preset for elements that no rule covers.
        exp_avg: The rule for exp_avg.
        exp_avg_sq: The rule for exp_avg_sq.
        parameters: Number of unsharded parameters of which it covers at least one row.
        elements: Number of unsharded elements.
        examples: Some of the parameters, with the rows if it does not cover all.
    """

    rule: str
    exp_avg: str
    exp_avg_sq: str
    parameters: int
    elements: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class MomentsForecast:
    """The rules for the moments of a chain.

    Args:
        decided: For each optimizer of the chain the plans of its parameters; empty if the moments
            do not change, None if the plans cannot be determined offline.
        errors: Errors for which the resume would be refused.
        warnings: Risks that the user should know.
        notes: Source of the names, or the reason why they are unknown.
    """

    decided: tuple[tuple[ParameterPlan, ...] | None, ...]
    errors: tuple[MegatronExtError, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def forecast_moments(
    stored: StoredCheckpoint,
    policy: ResumePolicy,
    plans: Sequence[ResumePlan | None],
    current: CurrentGroups,
    found: Stored,
    rows: tuple[int, int] | None = None,
    *,
    decoupled: bool = False,
    new: Collection[str] = (),
) -> MomentsForecast:
    """Resolve a policy's rules on the parameters of a checkpoint.

    Args:
        stored: The checkpoint.
        policy: The policy, without operations that have been done already.
        plans: The plan of each optimizer of the chain, or None.
        current: The current param_groups of each optimizer.
        found: The checkpoint's parameters.
        rows: Rows of the embedding in the checkpoint and now, if these differ.
        decoupled: Whether embedding and output layer have a separate learning rate.
        new: The names of parameters that are known to be new to the optimizers.
    """
    changes = policy.decides_moments
    if not (changes or policy.groups or rows):
        return MomentsForecast(((),) * len(plans))
    if found.by is None:
        note = (
            "a checkpoint of the format torch does not name its parameters, so the rules cannot be "
            "assigned to them offline. A run with --selective-dry-run shows the assignment before "
            "its first step"
        )
        return MomentsForecast((None,) * len(plans), notes=(note,))
    groups = current.optimizers
    parameters = in_groups(found.parameters, groups, rows, decoupled, current.places)
    errors: list[MegatronExtError] = []
    idle = _idle(policy, parameters, groups)
    # A rule may match a new parameter that only the script adds.
    refused = policy.strict and not policy.parameters.new
    if idle and refused:
        errors.append(PlanError(f"{idle}. Correct the rule, or pass --no-selective-strict"))
    decided: list[tuple[ParameterPlan, ...] | None] = []
    for plan, of_one, groups_now, saved in zip(
        plans, parameters, groups, stored.optimizers, strict=True
    ):
        wanted = of_one if changes else [p for p in of_one if p.saved_rows is not None]
        decided.append(())
        if plan is not None:
            try:
                decided[-1] = plan_moments(plan, wanted, saved.groups, groups_now)
            except MegatronExtError as e:
                errors.append(e)
                decided[-1] = None
    if None not in decided:
        names = [p.name for of_one in parameters for p in of_one]
        errors += _wrong_means(policy, [one or () for one in decided], new, names)
    return MomentsForecast(
        tuple(decided),
        tuple(errors),
        (idle,) if idle and not refused else (),
        (_names_note(found),) if changes else (),
    )


def rules_of(policy: ResumePolicy, decided: Sequence[ParameterPlan]) -> tuple[RuleForecast, ...]:
    """Group the plans by rule, in the order of the report; the preset is last.

    Args:
        policy: The policy, without operations that have been done already.
        decided: The plans of all parameters of an optimizer.

    Returns:
        One item per rule; empty if the policy keeps the moments.
    """
    if not policy.decides_moments:
        return ()
    rules = policy.described_rules
    parameters, elements = [0] * len(rules), [0] * len(rules)
    examples: list[list[str]] = [[] for _ in rules]
    for one in decided:
        by_rule: dict[int, list[tuple[int, int]]] = {}
        for rows in one.rows:
            number = len(rules) - 1 if rows.rule is None else rows.rule
            by_rule.setdefault(number, []).append((rows.first, rows.last))
        for number, spans in by_rule.items():
            parameters[number] += 1
            elements[number] += _rows(spans) * one.parameter.row_elements
            if len(examples[number]) < _EXAMPLES:
                examples[number].append(_example(one.parameter, spans))
    return tuple(
        RuleForecast(name, write(m), write(v), parameters[i], elements[i], tuple(examples[i]))
        for i, (name, m, v) in enumerate(rules)
    )


def _wrong_means(
    policy: ResumePolicy,
    decided: Sequence[Sequence[ParameterPlan]],
    new: Collection[str],
    names: Sequence[str],
) -> Iterator[PlanError]:
    """Yield the errors of the rules `fill mean-of` that every rank of the run would raise."""
    for one in means_of(policy):
        needed = [of_one for of_one in decided if any(one in plan.statistics for plan in of_one)]
        # Which optimizer updates a parameter that only the script adds is not known.
        for mine in needed or [list(chain.from_iterable(decided))]:
            others = (p for of_one in decided if needed and of_one is not mine for p in of_one)
            found = offer(one, mine, new, [p.parameter.name for p in others])
            try:
                sources_of(one, [found], sorted({*names[:1], *names[-1:]}))
            except PlanError as e:
                yield e


def _idle(
    policy: ResumePolicy, parameters: Sequence[Sequence[Parameter]], groups: Sequence[Groups]
) -> str:
    """Write the message about rules that match nothing; empty if there are none."""
    of_each = (used_rules(policy, *one) for one in zip(parameters, groups, strict=True))
    used = set().union(*of_each)
    used_groups = used_group_rules(policy, [g for current in groups for g in current])
    names = [p.name for of_one in parameters for p in of_one]
    return unmatched(policy, used, used_groups, sorted({*names[:1], *names[-1:]}))


def _names_note(found: Stored) -> str:
    """Describe the source of the parameters' names."""
    count = len(found.parameters)
    if found.by == "optimizer":
        return f"rules: the moments in the checkpoint give the names of {count} parameters"
    return (
        f"rules: the moments are stored by buckets, so the model's tensors give the names of "
        f"{count} parameters; tensors that are not trained are included"
    )


def _rows(spans: Sequence[tuple[int, int]]) -> int:
    return sum(last - first for first, last in spans)


def _example(parameter: Parameter, spans: Sequence[tuple[int, int]]) -> str:
    if _rows(spans) == parameter.rows:
        return parameter.name
    return f"{parameter.name}[{', '.join(f'{first}:{last}' for first, last in spans)}]"
