"""Which rule is for which rows of which parameters, told from a checkpoint's index. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.stored import StoredCheckpoint
from ..errors import MegatronExtError, PlanError
from ..plan.decisions import ResumePlan
from ..plan.matching import unmatched, used_group_rules, used_rules
from ..plan.moments import plan_moments
from ..plan.parameters import Parameter, ParameterPlan
from ..policy.policy import ResumePolicy
from ..rules.registry import write
from .stored_parameters import Stored, in_groups, parameters_of

#: Names of parameters that are shown for a rule.
_EXAMPLES = 5

Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class RuleForecast:
    """What one rule is for.

    Args:
        rule: Its match, or the preset for what no rule names.
        exp_avg: What is done to exp_avg.
        exp_avg_sq: What is done to exp_avg_sq.
        parameters: Number of unsharded parameters of which it is for some rows.
        elements: Number of elements, unsharded.
        examples: Some of the parameters, with the rows where it is not for all.
    """

    rule: str
    exp_avg: str
    exp_avg_sq: str
    parameters: int
    elements: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class MomentsForecast:
    """What is done to the moments.

    Args:
        decided: For each optimizer of the chain its parameters' plans; empty where nothing is done,
            None where it cannot be told.
        errors: Why the resume would be refused.
        warnings: What a user should look at.
        notes: How it was told, or why it cannot be.
    """

    decided: tuple[tuple[ParameterPlan, ...] | None, ...]
    errors: tuple[MegatronExtError, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def forecast_moments(
    stored: StoredCheckpoint,
    policy: ResumePolicy,
    plans: Sequence[ResumePlan | None],
    groups: Sequence[Groups],
    rows: tuple[int, int] | None = None,
    *,
    decoupled: bool = False,
) -> MomentsForecast:
    """Resolve a policy's rules on the parameters of a checkpoint.

    Args:
        stored: The checkpoint.
        policy: What is left to do.
        plans: One for each optimizer of the chain; None where there is none.
        groups: For each the current param_groups.
        rows: Rows of the embedding in the checkpoint and now, where these differ.
        decoupled: Whether embedding and output layer have a learning rate of their own.
    """
    changes = policy.decides_moments
    if not (changes or policy.groups or rows):
        return MomentsForecast(((),) * len(plans))
    found = parameters_of(stored)
    if found.by is None:
        note = (
            "a checkpoint of the format torch does not name its parameters, so that which rule is "
            "for which of them cannot be told offline: a run with --selective-dry-run shows it "
            "before its first step"
        )
        return MomentsForecast((None,) * len(plans), notes=(note,))
    parameters = in_groups(found.parameters, groups, rows, decoupled)
    errors: list[MegatronExtError] = []
    idle = _idle(policy, parameters, groups)
    if idle and policy.strict:
        errors.append(PlanError(f"{idle}. Mend the rule, or pass --no-selective-strict"))
    decided: list[tuple[ParameterPlan, ...] | None] = []
    for plan, of_one, current, saved in zip(
        plans, parameters, groups, stored.optimizers, strict=True
    ):
        wanted = of_one if changes else [p for p in of_one if p.saved_rows is not None]
        decided.append(())
        if plan is not None and any("betas" in g for g in current):
            try:
                decided[-1] = plan_moments(plan, wanted, saved.groups, current)
            except MegatronExtError as e:
                errors.append(e)
                decided[-1] = None
    return MomentsForecast(
        tuple(decided),
        tuple(errors),
        (idle,) if idle and not policy.strict else (),
        (_told_by(found),) if changes else (),
    )


def rules_of(policy: ResumePolicy, decided: Sequence[ParameterPlan]) -> tuple[RuleForecast, ...]:
    """What was decided, by rule as the report has it; the preset last.

    Args:
        policy: What is left to do.
        decided: Of all parameters of an optimizer.

    Returns:
        Empty where the policy keeps the moments.
    """
    if not policy.decides_moments:
        return ()
    told = policy.told_rules
    parameters, elements = [0] * len(told), [0] * len(told)
    examples: list[list[str]] = [[] for _ in told]
    for one in decided:
        by_rule: dict[int, list[tuple[int, int]]] = {}
        for rows in one.rows:
            number = len(told) - 1 if rows.rule is None else rows.rule
            by_rule.setdefault(number, []).append((rows.first, rows.last))
        for number, spans in by_rule.items():
            parameters[number] += 1
            elements[number] += _rows(spans) * one.parameter.row_elements
            if len(examples[number]) < _EXAMPLES:
                examples[number].append(_example(one.parameter, spans))
    return tuple(
        RuleForecast(name, write(m), write(v), parameters[i], elements[i], tuple(examples[i]))
        for i, (name, m, v) in enumerate(told)
    )


def _idle(
    policy: ResumePolicy, parameters: Sequence[Sequence[Parameter]], groups: Sequence[Groups]
) -> str:
    """What to say of rules that match nothing."""
    of_each = (used_rules(policy, *one) for one in zip(parameters, groups, strict=True))
    used = set().union(*of_each)
    used_groups = used_group_rules(policy, [g for current in groups for g in current])
    names = [p.name for of_one in parameters for p in of_one]
    return unmatched(policy, used, used_groups, sorted({*names[:1], *names[-1:]}))


def _told_by(found: Stored) -> str:
    count = len(found.parameters)
    if found.by == "optimizer":
        return f"rules: {count} parameters by the names of their moments in the checkpoint"
    return (
        f"rules: the moments are stored by buckets, so that the {count} parameters are named by "
        "the model's tensors; a tensor that is not trained counts with them"
    )


def _rows(spans: Sequence[tuple[int, int]]) -> int:
    return sum(last - first for first, last in spans)


def _example(parameter: Parameter, spans: Sequence[tuple[int, int]]) -> str:
    if _rows(spans) == parameter.rows:
        return parameter.name
    return f"{parameter.name}[{', '.join(f'{first}:{last}' for first, last in spans)}]"
