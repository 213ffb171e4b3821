"""Convert a `ResumePolicy` from and to plain data, as in YAML and in reports."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args, get_type_hints

from ..errors import PolicyError
from ..rules.registry import parse, write
from .checks import boolean, listed, mapping, strings, text, whole_number
from .match import GroupRule, Match, MomentRule
from .parameter_document import parameters_content, parameters_from
from .policy import ResumePolicy
from .presets import CATALOGUE, KEEP_ALL, Preset
from .schema import (
    CountersDocument,
    GroupRuleDocument,
    HyperparametersDocument,
    MatchDocument,
    MomentRuleDocument,
    PolicyDocument,
)

_COUNTERS = {key: get_args(values) for key, values in get_type_hints(CountersDocument).items()}


def from_dict(content: Any) -> ResumePolicy:
    """Build a policy from plain data.

    Args:
        content: The data as read from YAML or JSON.

    Raises:
        PolicyError: The data is not a policy. The error names the place.
    """
    content = mapping(content, "policy", PolicyDocument)
    found = content.get("hyperparameters", {})
    hyper = mapping(found, "hyperparameters", HyperparametersDocument)
    return ResumePolicy(
        keep_hyperparameters=strings(hyper.get("keep", ()), "hyperparameters.keep"),
        take_hyperparameters=strings(hyper.get("take", ()), "hyperparameters.take"),
        hyperparameters=hyper.get("source", "args"),
        groups=tuple(
            _group_rule(g, f"hyperparameters.groups[{i}]")
            for i, g in enumerate(listed(hyper.get("groups", ()), "hyperparameters.groups"))
        ),
        schedule=content.get("schedule", "args"),
        preset=_preset(content.get("preset", "keep")),
        rules=tuple(
            _rule(r, f"moments[{i}]")
            for i, r in enumerate(listed(content.get("moments", ()), "moments"))
        ),
        step=content.get("step"),
        nonfinite=content.get("nonfinite", "error"),
        master_weights=content.get("master_weights", "checkpoint"),
        parameters=parameters_from(content.get("parameters", {})),
        strict=boolean(content.get("strict", True), "strict"),
        phase=text(content.get("phase", ""), "phase"),
        **_counters(content.get("counters", {})),
    )


def to_dict(policy: ResumePolicy) -> PolicyDocument:
    """Plain data that `from_dict` reads back as the same policy; defaults are left out."""
    out: PolicyDocument = {}
    if hyper := _hyperparameters(policy):
        out["hyperparameters"] = hyper
    if policy.schedule != "args":
        out["schedule"] = policy.schedule
    if policy.preset != KEEP_ALL:
        out["preset"] = _preset_dict(policy.preset)
    if policy.rules:
        out["moments"] = [
            {
                "match": _match_content(r.match),
                "exp_avg": write(r.exp_avg),
                "exp_avg_sq": write(r.exp_avg_sq),
            }
            for r in policy.rules
        ]
    if policy.step is not None:
        out["step"] = policy.step
    if policy.nonfinite != "error":
        out["nonfinite"] = policy.nonfinite
    if policy.master_weights != "checkpoint":
        out["master_weights"] = policy.master_weights
    if policy.parameters:
        out["parameters"] = parameters_content(policy.parameters)
    if not policy.strict:
        out["strict"] = False
    counters: CountersDocument = {}
    if policy.reset_iteration:
        counters["iteration"] = "reset"
    if policy.reset_dataloader:
        counters["dataloader"] = "reset"
    if policy.schedule_position is not None:
        counters["schedule"] = policy.schedule_position
    if policy.grad_scaler != "keep":
        counters["grad_scaler"] = policy.grad_scaler
    if counters:
        out["counters"] = counters
    if policy.phase:
        out["phase"] = policy.phase
    return out


def _hyperparameters(policy: ResumePolicy) -> HyperparametersDocument:
    out: HyperparametersDocument = {}
    if policy.hyperparameters != "args":
        out["source"] = policy.hyperparameters
    if policy.keep_hyperparameters:
        out["keep"] = list(policy.keep_hyperparameters)
    if policy.take_hyperparameters:
        out["take"] = list(policy.take_hyperparameters)
    if policy.groups:
        out["groups"] = [_group_content(rule) for rule in policy.groups]
    return out


def _group_content(rule: GroupRule) -> GroupRuleDocument:
    out: GroupRuleDocument = {"match": dict(rule.match)}
    if rule.keep:
        out["keep"] = list(rule.keep)
    if rule.take:
        out["take"] = list(rule.take)
    return out


def _counters(found: Any) -> dict[str, Any]:
    content = mapping(found, "counters", CountersDocument)
    for key, value in content.items():
        if value not in _COUNTERS[key]:
            raise PolicyError(
                f"counters.{key}: expected {' or '.join(_COUNTERS[key])}, found {value!r}"
            )
    return {
        "reset_iteration": content.get("iteration") == "reset",
        "reset_dataloader": content.get("dataloader") == "reset",
        "schedule_position": content.get("schedule"),
        "grad_scaler": content.get("grad_scaler", "keep"),
    }


def _preset(found: Any) -> Preset:
    if isinstance(found, str):
        name, *numbers = found.split() or [""]
        return Preset(name, tuple(numbers))  # type: ignore[arg-type]
    if not isinstance(found, Mapping) or "name" not in found:
        raise PolicyError(f"preset: expected a name, or a mapping with 'name', found {found!r}")
    if (name := found["name"]) not in [*CATALOGUE]:
        return Preset(name)
    arguments = tuple(a.lower() for a in CATALOGUE[name].arguments)
    decline = ("decline",) if CATALOGUE[name].declinable else ()
    mapping(found, f"preset {name}", ("name", *arguments, *decline))
    return Preset(
        name,
        tuple(found[a] for a in arguments if a in found),
        strings(found.get("decline", ()), "preset.decline"),
    )


def _preset_dict(preset: Preset) -> str | dict[str, Any]:
    if not preset.arguments and not preset.decline:
        return preset.name
    names = (a.lower() for a in CATALOGUE[preset.name].arguments)
    out: dict[str, Any] = {"name": preset.name, **dict(zip(names, preset.arguments, strict=True))}
    if preset.decline:
        out["decline"] = list(preset.decline)
    return out


def _group_rule(found: Any, where: str) -> GroupRule:
    rule = mapping(found, where, GroupRuleDocument)
    return GroupRule(
        tuple(mapping(rule.get("match", {}), f"{where}.match").items()),
        strings(rule.get("keep", ()), f"{where}.keep"),
        strings(rule.get("take", ()), f"{where}.take"),
    )


def _rule(found: Any, where: str) -> MomentRule:
    rule = mapping(found, where, MomentRuleDocument)
    if "match" not in rule:
        raise PolicyError(f"{where}: expected 'match', found only {', '.join(map(repr, rule))}")
    try:
        return MomentRule(
            _match(rule["match"], f"{where}.match"),
            parse(rule.get("exp_avg", "keep")),
            parse(rule.get("exp_avg_sq", "keep")),
        )
    except PolicyError as e:
        raise PolicyError(str(e) if str(e).startswith(where) else f"{where}: {e}") from None


def _match(found: Any, where: str) -> Match:
    if isinstance(found, str):
        return Match.parse(found)
    if not isinstance(found, Mapping):
        raise PolicyError(f"{where}: expected a text or a mapping, found {found!r}")
    content = mapping(found, where, MatchDocument)
    return Match(
        content.get("name", "*"),
        _rows(content["rows"], f"{where}.rows") if "rows" in content else None,
        content.get("ndim"),
        tuple(mapping(content.get("group", {}), f"{where}.group").items()),
    )


def _match_content(match: Match) -> str | MatchDocument:
    """As a text, or as a mapping where the text would be read as another match."""
    try:
        if Match.parse(str(match)) == match:
            return str(match)
    except PolicyError:
        pass
    out: MatchDocument = {"name": match.name}
    if match.rows is not None:
        out["rows"] = ":".join("" if r is None else str(r) for r in match.rows)
    if match.ndim is not None:
        out["ndim"] = match.ndim
    if match.group:
        out["group"] = dict(match.group)
    return out


def _rows(found: Any, where: str) -> tuple[int | None, int | None]:
    ends = re.fullmatch(r"(\d*):(\d*)", found) if isinstance(found, str) else None
    if ends is None:
        raise PolicyError(
            f"{where}: expected a text in quotes such as '32000:' or '0:128', found {found!r}"
        )
    first, last = (whole_number(e, where) if e else None for e in ends.groups())
    return first, last
