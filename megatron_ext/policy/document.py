"""Convert a `ResumePolicy` from and to plain data, as in YAML and in reports."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import PolicyError
from ..rules.registry import parse, write
from .match import GroupRule, Match, MomentRule
from .policy import ResumePolicy
from .presets import CATALOGUE, KEEP_ALL, Preset

_TOP = (
    *("hyperparameters", "schedule", "preset", "moments", "step", "nonfinite", "strict"),
    *("counters", "phase"),
)
_COUNTER_CHOICES = {
    "iteration": ("keep", "reset"),
    "dataloader": ("keep", "reset"),
    "schedule": ("continue", "restart"),
    "grad_scaler": ("keep", "reset"),
}
_HYPERPARAMETERS = ("source", "keep", "take", "groups")
_GROUP = ("match", "keep", "take")
_RULE = ("match", "exp_avg", "exp_avg_sq")
_MATCH = ("name", "rows", "ndim", "group")


def from_dict(content: Any) -> ResumePolicy:
    """Build a policy from plain data.

    Args:
        content: The data as read from YAML or JSON.

    Raises:
        PolicyError: The data is not a policy. The error names the place.
    """
    content = _mapping(content, "policy", _TOP)
    hyper = _mapping(content.get("hyperparameters", {}), "hyperparameters", _HYPERPARAMETERS)
    return ResumePolicy(
        keep_hyperparameters=_strings(hyper.get("keep", ()), "hyperparameters.keep"),
        take_hyperparameters=_strings(hyper.get("take", ()), "hyperparameters.take"),
        hyperparameters=hyper.get("source", "args"),
        groups=tuple(
            _group_rule(g, f"hyperparameters.groups[{i}]")
            for i, g in enumerate(_list(hyper.get("groups", ()), "hyperparameters.groups"))
        ),
        schedule=content.get("schedule", "args"),
        preset=_preset(content.get("preset", "keep")),
        rules=tuple(
            _rule(r, f"moments[{i}]")
            for i, r in enumerate(_list(content.get("moments", ()), "moments"))
        ),
        step=content.get("step"),
        nonfinite=content.get("nonfinite", "error"),
        strict=_boolean(content.get("strict", True), "strict"),
        phase=_text(content.get("phase", ""), "phase"),
        **_counters(content.get("counters", {})),
    )


def to_dict(policy: ResumePolicy) -> dict[str, Any]:
    """Convert a policy to plain data for `from_dict`; defaults are left out."""
    out: dict[str, Any] = {}
    hyper: dict[str, Any] = {}
    if policy.hyperparameters != "args":
        hyper["source"] = policy.hyperparameters
    for name, keys in (
        ("keep", policy.keep_hyperparameters),
        ("take", policy.take_hyperparameters),
    ):
        if keys:
            hyper[name] = list(keys)
    if policy.groups:
        hyper["groups"] = [
            {
                "match": dict(g.match),
                **({"keep": list(g.keep)} if g.keep else {}),
                **({"take": list(g.take)} if g.take else {}),
            }
            for g in policy.groups
        ]
    if hyper:
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
    if not policy.strict:
        out["strict"] = False
    counters = {
        "iteration": "reset" if policy.reset_iteration else "keep",
        "dataloader": "reset" if policy.reset_dataloader else "keep",
        "schedule": policy.schedule_position,
        "grad_scaler": policy.grad_scaler,
    }
    if chosen := {k: v for k, v in counters.items() if v not in ("keep", None)}:
        out["counters"] = chosen
    if policy.phase:
        out["phase"] = policy.phase
    return out


def _counters(found: Any) -> dict[str, Any]:
    content = _mapping(found, "counters", tuple(_COUNTER_CHOICES))
    for key, value in content.items():
        if value not in _COUNTER_CHOICES[key]:
            raise PolicyError(
                f"counters.{key}: expected {' or '.join(_COUNTER_CHOICES[key])}, found {value!r}"
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
    _mapping(found, f"preset {name}", ("name", *arguments, *decline))
    return Preset(
        name,
        tuple(found[a] for a in arguments if a in found),
        _strings(found.get("decline", ()), "preset.decline"),
    )


def _preset_dict(preset: Preset) -> Any:
    if not preset.arguments and not preset.decline:
        return preset.name
    names = (a.lower() for a in CATALOGUE[preset.name].arguments)
    out: dict[str, Any] = {"name": preset.name, **dict(zip(names, preset.arguments, strict=True))}
    if preset.decline:
        out["decline"] = list(preset.decline)
    return out


def _group_rule(found: Any, where: str) -> GroupRule:
    rule = _mapping(found, where, _GROUP)
    return GroupRule(
        tuple(_mapping(rule.get("match", {}), f"{where}.match").items()),
        _strings(rule.get("keep", ()), f"{where}.keep"),
        _strings(rule.get("take", ()), f"{where}.take"),
    )


def _rule(found: Any, where: str) -> MomentRule:
    rule = _mapping(found, where, _RULE)
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
    content = _mapping(found, where, _MATCH)
    return Match(
        content.get("name", "*"),
        _rows(content["rows"], f"{where}.rows") if "rows" in content else None,
        content.get("ndim"),
        tuple(_mapping(content.get("group", {}), f"{where}.group").items()),
    )


def _match_content(match: Match) -> Any:
    """Write a match as text, or as a mapping if the text would be read as another match."""
    try:
        if Match.parse(str(match)) == match:
            return str(match)
    except PolicyError:
        pass
    out: dict[str, Any] = {"name": match.name}
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
    first, last = (int(e) if e else None for e in ends.groups())
    return first, last


def _mapping(found: Any, where: str, known: Sequence[str] | None = None) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise PolicyError(f"{where}: expected a mapping, found {found!r}")
    for key in found:
        if not isinstance(key, str):
            raise PolicyError(f"{where}: expected names as keys, found {key!r}")
        if known is not None and key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise PolicyError(f"{where}: unknown key {key!r}; {hint}Known: {', '.join(known)}")
        if known is not None and found[key] is None:
            raise PolicyError(f"{where}: {key}: expected a value, found nothing")
    return found


def _list(found: Any, where: str) -> Sequence[Any]:
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise PolicyError(f"{where}: expected a list, found {found!r}")
    return found


def _strings(found: Any, where: str) -> tuple[str, ...]:
    items = _list(found, where)
    for item in items:
        if not isinstance(item, str):
            raise PolicyError(f"{where}: expected names, found {item!r}")
        if items.count(item) > 1:
            raise PolicyError(f"{where}: {item!r} is given twice; expected once")
    return tuple(items)


def _text(found: Any, where: str) -> str:
    if not isinstance(found, str):
        quoted = f"; write '{found}' in quotes" if isinstance(found, int | float) else ""
        raise PolicyError(f"{where}: expected a text, found {found!r}{quoted}")
    return found


def _boolean(found: Any, where: str) -> bool:
    if not isinstance(found, bool):
        raise PolicyError(f"{where}: expected true or false, found {found!r}")
    return found
