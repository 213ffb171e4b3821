"""Parse and check the settings of an edit before anything is written."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checkpoint.state import NOT_HYPERPARAMETERS, canonical, optimizer_section, saved_key
from ..checkpoint.stored import has_groups
from ..errors import PolicyError
from ..policy.match import Scalar, attributes, has_attributes, scalar
from .overwritten import COMPUTED, DECAY_BOUNDS, no_effect, refuse_overwritten

#: Keys of the scheduler's state in a checkpoint; the second is the older name.
_SCHEDULERS = ("opt_param_scheduler", "lr_scheduler")
Step = str | int
Value = Scalar | tuple[Scalar, ...]
#: A param_group or the state of a scheduler: its place, the path of keys, and its content.
_Found = tuple[str, tuple[Step, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class EditedValue:
    """One changed value in a checkpoint.

    Args:
        where: Key of the object in the store, or path of the file in the iteration's directory.
        path: Keys that lead to the param_group or to the scheduler's state in that object.
        key: Key of the value.
        old: The saved value; a tensor without dimensions as a number.
        new: The new value, of the same type.
    """

    where: str
    path: tuple[Step, ...]
    key: str
    old: Any
    new: Any

    @property
    def in_scheduler(self) -> bool:
        """Whether the value belongs to the scheduler instead of a param_group."""
        return self.path[0] in _SCHEDULERS


def parse_settings(words: Iterable[str], flag: str = "--set") -> dict[str, Value]:
    """Parse ``KEY=VALUE`` words; a value with commas is a tuple.

    Args:
        words: The words of a command line.
        flag: Their flag, for errors.

    Raises:
        PolicyError: A word cannot be parsed, or a key occurs twice.
    """
    out: dict[str, Value] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not re.fullmatch(r"\w+", key) or not text:
            raise PolicyError(f"{flag}: expected KEY=VALUE, found {word!r}")
        if key in out:
            raise PolicyError(f"{flag}: {key!r} is given twice; expected one value")
        inside = text.strip("()[]")
        several = "," in inside
        out[key] = tuple(scalar(t.strip()) for t in inside.split(",")) if several else scalar(text)
    return out


def plan_edit(
    places: Mapping[str, Any],
    settings: Mapping[str, Value],
    group: Mapping[str, Scalar] | None = None,
) -> tuple[EditedValue, ...]:
    """Decide which values change.

    Args:
        places: Place -> its content: a training state, or one optimizer's state dict.
        settings: See `megatron_ext.offline.edit.edit`.
        group: See `megatron_ext.offline.edit.edit`.

    Returns:
        The changes, those of groups first.

    Raises:
        PolicyError: See `megatron_ext.offline.edit.edit`.
    """
    wanted = attributes(group or {}, "--group")
    if not settings:
        raise PolicyError("--set: expected at least one KEY=VALUE, found none")
    groups = [(w, p, value_at(places[w], p)) for w in places for p in _group_paths(places[w])]
    chosen = [found for found in groups if has_attributes(canonical(found[2]), wanted)]
    if wanted and not chosen:
        have = sorted({_described(g, [k for k, _ in wanted]) for _, _, g in groups})
        raise PolicyError(
            f"--group {_text(wanted)}: fits no param_group; the checkpoint's have "
            f"{' | '.join(have) or 'no optimizer state'}"
        )
    schedulers: list[_Found] = [
        (w, (k,), state[k])
        for w, state in places.items()
        for k in _SCHEDULERS
        if isinstance(state.get(k), Mapping)
    ]
    others = [g for g in groups if g not in chosen]

    def changes_of(key: str, value: Value) -> list[EditedValue]:
        found = _group_changes(key, value, chosen, bool(wanted))
        return found + _scheduler_changes(key, value, schedulers, found, others)

    changes = []
    for key, value in settings.items():
        found = changes_of(key, value)
        if not found:
            raise _unknown(key, chosen, schedulers, bool(wanted))
        changes += found
    if schedulers:
        refuse_overwritten(settings, schedulers)
        if "weight_decay" in settings:
            implied = [b for b in DECAY_BOUNDS if b not in settings]
            bounds = [c for b in implied for c in changes_of(b, settings["weight_decay"])]
            if implied and not bounds:
                raise no_effect(bool(wanted))
            changes += bounds
    _check_range(places, changes)
    return tuple(sorted(changes, key=lambda c: c.in_scheduler))


def _group_changes(key: str, value: Value, groups: list[_Found], named: bool) -> list[EditedValue]:
    if key in NOT_HYPERPARAMETERS:
        raise PolicyError(
            f"--set {key}: it is optimizer state, not a hyperparameter; expected a key such "
            "as max_lr, min_lr, betas, eps or weight_decay"
        )
    out = []
    for where, path, group in groups:
        saved = saved_key(group, key)
        if saved in group:
            own = value
            if key == "weight_decay" and _is_number(value):
                own = value * canonical(group).get("wd_mult", 1.0)
            new = _typed(key, group[saved], own, f"a param_group of {where}")
            out.append(EditedValue(where, path, saved, group[saved], new))
    values = sorted({repr(c.old) for c in out})
    if len(values) > 1 and not named and key not in COMPUTED:
        # A tuple cannot be used as an attribute of --group.
        chosen_by = "is_expert_parallel=true" if "," in values[0] else f"{key}={values[0]}"
        raise PolicyError(
            f"--set {key}: the param_groups hold {' and '.join(values)}, and one value for all "
            "would make them equal. Choose param_groups with --group, for example "
            f"--group {chosen_by}"
        )
    return out


def _scheduler_changes(
    key: str, value: Value, schedulers: list[_Found], mine: list[EditedValue], others: list[_Found]
) -> list[EditedValue]:
    """Change the scheduler's value if the changed groups, and no others, had the same value."""
    out = []
    for where, path, state in schedulers:
        if key not in state:
            continue
        chosen = any(c.old == state[key] for c in mine) or not (mine or others)
        # A group without the key has the scheduler's value.
        if others and (
            not chosen or any(g.get(key, state[key]) == state[key] for _, _, g in others)
        ):
            continue
        new = _typed(key, state[key], value, f"{path[0]} of {where}")
        out.append(EditedValue(where, path, key, state[key], new))
    return out


def _typed(key: str, old: Any, new: Any, where: str) -> Any:
    """Convert the new value to the type of the saved one."""
    if isinstance(old, tuple | list):
        if isinstance(new, tuple | list) and len(new) == len(old):
            return type(old)(_typed(key, o, n, where) for o, n in zip(old, new, strict=True))
    elif isinstance(old, bool) or isinstance(new, bool):
        if isinstance(old, bool) and isinstance(new, bool):
            return new
    elif isinstance(old, float):
        if _is_number(new) and math.isfinite(new):
            return float(new)
    elif isinstance(old, int):
        if isinstance(new, int):
            return new
    elif old is None:
        if new is None or (_is_number(new) and math.isfinite(new)):
            return new
    elif isinstance(old, str) and isinstance(new, str):
        return new
    raise PolicyError(
        f"--set {key}: expected {_kind(old)} as in {where}, which has {old!r}; found {new!r}"
    )


def _kind(old: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    if isinstance(old, tuple | list):
        return f"{len(old)} values with commas"
    if old is None:
        return "a number or none"
    return kinds.get(type(old), f"a {type(old).__name__} (which cannot be set)")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_range(places: Mapping[str, Any], changes: Iterable[EditedValue]) -> None:
    """Require min_lr <= max_lr and start_wd <= end_wd in every edited group and scheduler."""
    owners: dict[tuple[str, tuple[Step, ...]], dict[str, Any]] = defaultdict(dict)
    for change in changes:
        owners[change.where, change.path][change.key] = change.new
    for (where, path), new in owners.items():
        after = {**value_at(places[where], path), **new}
        for low, high in (("min_lr", "max_lr"), ("start_wd", "end_wd")):
            both: list[Any] = [after.get(low), after.get(high)]
            if {low, high} & new.keys() and all(map(_is_number, both)) and both[0] > both[1]:
                raise PolicyError(
                    f"--set: expected {low} <= {high}, as Megatron asserts; found {low} "
                    f"{both[0]!r} and {high} {both[1]!r} in {where}. Set both"
                )


def _unknown(key: str, groups: list[_Found], schedulers: list[_Found], named: bool) -> PolicyError:
    known = {k for _, _, g in groups for k in canonical(g)} - set(NOT_HYPERPARAMETERS)
    in_scheduler = {k for _, _, s in schedulers for k in s}
    if named and key in in_scheduler:
        return PolicyError(
            f"--set {key}: only the scheduler has this key, not the param_groups that --group "
            "chooses. Leave out --group"
        )
    return PolicyError(
        f"--set {key}: no such key is saved; expected one of the param_groups' "
        f"({', '.join(sorted(known)) or 'none'}) or the scheduler's "
        f"({', '.join(sorted(in_scheduler)) or 'none'})"
    )


def _described(group: Mapping[str, Any], keys: list[str]) -> str:
    values = canonical(group)
    return " ".join(f"{k}={values[k]}" if k in values else f"no {k}" for k in keys)


def _text(wanted: Sequence[tuple[str, Scalar]]) -> str:
    return " ".join(f"{key}={value}" for key, value in wanted)


def _group_paths(state: Mapping[str, Any]) -> Iterator[tuple[Step, ...]]:
    """Yield the paths of the param_groups in a training state or an optimizer's state dict."""
    section = state.get("optimizer")
    candidates: list[tuple[tuple[Step, ...], Any]] = [((), state)]
    if isinstance(section, list):
        candidates = [(("optimizer", n), s) for n, s in enumerate(section)]
    elif isinstance(section, Mapping) and all(isinstance(n, int) for n in section):
        candidates = [(("optimizer", n), s) for n, s in section.items()]
    elif section is not None:
        candidates = [(("optimizer",), section)]
    for path, found in candidates:
        if isinstance(found, Mapping) and has_groups(found):
            name, inside = optimizer_section(found)
            nested = () if name is None else (name,)
            for number in range(len(inside["param_groups"])):
                yield (*path, *nested, "param_groups", number)


def value_at(state: Any, path: Iterable[Step]) -> Any:
    """Return the value at a path of keys in a state."""
    for step in path:
        state = state[step]
    return state
