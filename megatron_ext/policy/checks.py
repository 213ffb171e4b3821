"""Checks of a policy's fields."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from ..errors import PolicyError

#: Bounds of a policy, whoever wrote it.
MAX_ITEMS = 256
MAX_DIGITS = 18
#: Keys of a param_group that no policy keeps or takes, and why.
NOT_A_CHOICE = {
    "params": "the parameters always are the current model's",
    "step": "step is state, not a hyperparameter: see --selective-step",
    "lr": (
        "the scheduler computes lr from max_lr and min_lr before every step: "
        "keep 'max_lr' and 'min_lr' instead"
    ),
}


def unique_keys(found: Any, where: str, what: str) -> tuple[str, ...]:
    """Return keys as a tuple without repetitions.

    Raises:
        PolicyError: They are not a list of keys that can be kept.
    """
    if isinstance(found, str):
        raise PolicyError(
            f"{what}: expected a sequence of keys, found the string {found!r}; write [{found!r}]"
        )
    for key in found:
        if not isinstance(key, str) or not re.fullmatch(r"\w+", key):
            raise PolicyError(
                f"{where}: {key!r} is not a param_group key; "
                "expected names such as 'betas' or 'weight_decay', separated by spaces"
            )
        if key in NOT_A_CHOICE:
            raise PolicyError(f"{where}: {key!r} cannot be kept: {NOT_A_CHOICE[key]}")
    return tuple(dict.fromkeys(found))


def all_of(kind: type, found: Any, where: str) -> tuple[Any, ...]:
    """Return items as a tuple.

    Raises:
        PolicyError: One of them is not of the type `kind`.
    """
    items = tuple(found)
    for item in items:
        if not isinstance(item, kind):
            raise PolicyError(f"{where}: expected {kind.__name__}, found {item!r}")
    return items


def is_number(value: Any) -> bool:
    """Whether a value is a number. A bool is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def mapping(
    found: Any, where: str, declared: type | Sequence[str] | None = None
) -> Mapping[str, Any]:
    """Return a mapping of plain data.

    Args:
        found: The data.
        where: Its place, for errors.
        declared: The TypedDict that has its keys, or the keys; None for any.

    Raises:
        PolicyError: It is no mapping, or has another key or one without a value.
    """
    if not isinstance(found, Mapping):
        raise PolicyError(f"{where}: expected a mapping, found {found!r}")
    known = tuple(get_type_hints(declared)) if isinstance(declared, type) else declared
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


def listed(found: Any, where: str) -> Sequence[Any]:
    """Return a list of plain data, or raise."""
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise PolicyError(f"{where}: expected a list, found {found!r}")
    return found


def strings(found: Any, where: str) -> tuple[str, ...]:
    """Return texts that differ, or raise."""
    seen = set()
    for item in listed(found, where):
        if not isinstance(item, str):
            raise PolicyError(f"{where}: expected names, found {item!r}")
        if item in seen:
            raise PolicyError(f"{where}: {item!r} is given twice; expected once")
        seen.add(item)
    return tuple(found)


def at_most(found: Sequence[Any], where: str) -> None:
    """Refuse more items than a plan can meet with every parameter's name in seconds."""
    if len(found) > MAX_ITEMS:
        raise PolicyError(
            f"{where}: expected at most {MAX_ITEMS}, found {len(found)}. One pattern can match "
            "many parameters"
        )


def whole_number(digits: str, where: str) -> int:
    """Return a number of some digits, or raise: many digits take long to read."""
    if len(digits) > MAX_DIGITS:
        raise PolicyError(
            f"{where}: expected a number of at most {MAX_DIGITS} digits, found one of {len(digits)}"
        )
    return int(digits)


def text(found: Any, where: str) -> str:
    """Return a text, or raise."""
    if not isinstance(found, str):
        quoted = f"; write '{found}' in quotes" if isinstance(found, int | float) else ""
        raise PolicyError(f"{where}: expected a text, found {found!r}{quoted}")
    return found


def boolean(found: Any, where: str) -> bool:
    """Return a boolean, or raise."""
    if not isinstance(found, bool):
        raise PolicyError(f"{where}: expected true or false, found {found!r}")
    return found
