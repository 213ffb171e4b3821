"""Checks of a policy's fields."""

from __future__ import annotations

import re
from typing import Any

from ..errors import PolicyError

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
