"""Assign rules to the rows of parameters. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..errors import PlanError
from ..host.optimizers import ADAM, OptimizerState
from ..policy.match import MomentRule
from ..policy.policy import ResumePolicy
from ..rules.base import Rule
from ..rules.form import Key
from .fitting import fitted_preset, require_fit
from .parameters import Parameter


def overwritten(
    policy: ResumePolicy,
    parameter: Parameter,
    group: Mapping[str, Any] | None,
    optimizer: OptimizerState = ADAM,
) -> frozenset[Key]:
    """Return the moments of a parameter that are set in all its rows without reading old values.

    Args:
        policy: The policy.
        parameter: The parameter; its `saved_rows` do not matter.
        group: Its current param_group, or None if it is not known. The result is then empty if any
            rule depends on attributes of a group.
        optimizer: The state of its optimizer.

    Returns:
        The moments. Empty also if rules contradict each other, for which `plan_moments` raises.
    """
    if group is None and any(rule.match.group for rule in policy.rules):
        return frozenset()
    try:
        rows = operations_of(policy, parameter, group or {}, optimizer)
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
    """Return the positions of the rules that match at least one parameter.

    Args:
        policy: The policy with the rules.
        parameters: Parameters of one optimizer.
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
    """Return the positions of the group rules that fit at least one param_group."""
    return {i for i, rule in enumerate(policy.groups) if any(map(rule.fits, groups))}


def unmatched(
    policy: ResumePolicy,
    used: Collection[int],
    used_groups: Collection[int],
    names: Sequence[str],
) -> str:
    """Write the message about rules that match nothing; empty if all match something.

    Args:
        policy: The policy with the rules.
        used: Positions of the rules that match a parameter, on any rank.
        used_groups: Positions of the group rules that fit a param_group, on any rank.
        names: Some parameter names, as examples.
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


def operations_of(
    policy: ResumePolicy,
    parameter: Parameter,
    group: Mapping[str, Any],
    optimizer: OptimizerState = ADAM,
) -> list[tuple[int, int, Rule, Rule, int | None]]:
    """List first row, one past the last row, rules for both moments, and position of the rule."""
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
    rows: list[tuple[int, int, Rule, Rule, int | None]] = []
    at = 0
    for first, last, number in [*pieces, (parameter.rows, parameter.rows, -1)]:
        if at < first:
            rows.append((at, first, *fitted_preset(policy, optimizer, parameter.name), None))
        if first < last:
            rule, whole = rules[number], last - first == parameter.rows
            require_fit(rule, optimizer, parameter.name, whole=whole)
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
