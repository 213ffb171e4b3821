"""Conversion to plain Python and JSON values, and their comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """Return a 0-dim tensor or array (such as a capturable lr) as a number, others as they are."""
    return value.item() if getattr(value, "shape", None) == () else value


def as_json(value: Any) -> Any:
    """Convert a value to what JSON can represent: no NaN, no tuple, no object.

    Args:
        value: Anything. A value without a JSON equivalent becomes its str.
    """
    value = plain(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else str(as_json(k)): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((as_json(v) for v in value), key=repr)
    return str(value)


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal. A list equals its tuple, and NaN equals NaN."""
    return a is b or bool(as_json(a) == as_json(b))
