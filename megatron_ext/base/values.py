"""Conversion to plain Python and JSON values, and their comparison."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

_D = TypeVar("_D")


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


def fields_as_json(found: _D) -> _D:
    """The fields of a dataclass as JSON's mapping, for a document that is declared with the class.

    Args:
        found: The dataclass; its type stands for the mapping's, from which the schema is made. A
            field may be such a dataclass too, or a tuple of them.
    """
    given: Any = found
    mapping: Any = {f.name: _field_as_json(getattr(found, f.name)) for f in fields(given)}
    out: _D = mapping
    return out


def _field_as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_field_as_json(v) for v in value]
    return fields_as_json(value) if is_dataclass(value) else as_json(value)


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal. A list equals its tuple, and NaN equals NaN."""
    return a is b or bool(as_json(a) == as_json(b))
