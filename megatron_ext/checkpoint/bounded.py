"""Check what a pickle holds, before anything goes through it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from .placeholders import Placeholder

#: Bounds of what is read: levels, values counted as often as they occur, and bits of an integer.
_DEPTH = 100
_VALUES = 1_000_000
_BITS = 1024
#: How often a value may occur on average in what is larger.
_SHARED = 10


class Unbounded(ValueError):
    """An object is no plain tree of data of a reasonable size."""


def require_bounded(value: Any) -> None:
    """Require that a loaded object can be gone through: no circle, not deep, few repetitions.

    A pickle of some bytes can hold a list that holds a list twice, and so on sixty times: whoever
    prints or compares that never ends.

    Args:
        value: The object.

    Raises:
        Unbounded: It cannot.
    """
    # By id: the values below an object, itself included, and its levels; None while it is open.
    known: dict[int, tuple[int, int] | None] = {}
    stack = [(value, _inside(value))]
    while stack:
        node, inside = stack[-1]
        if id(node) in known:
            known[id(node)] = _measured(inside, known)
            stack.pop()
            continue
        known[id(node)] = None
        for one in inside:
            if id(one) not in known:
                if below := _inside(one):
                    stack.append((one, below))
            elif known[id(one)] is None:
                raise Unbounded("an object that contains itself")
        if len(stack) > _VALUES:
            raise Unbounded("too many values")
    size, _ = known[id(value)] or (1, 0)
    if size > _VALUES + _SHARED * len(known):
        raise Unbounded(f"{len(known)} values that are repeated to {size:.3g}")


def _measured(inside: list[Any], known: Mapping[int, Any]) -> tuple[int, int]:
    size = depth = 1
    for one in inside:
        below, levels = known.get(id(one)) or (1, 0)
        size, depth = size + below, max(depth, levels + 1)
    if depth > _DEPTH:
        raise Unbounded(f"more than {_DEPTH} levels")
    return min(size, 1 << 62), depth


def _inside(value: Any) -> list[Any]:
    """List what a value holds; an integer of many digits is refused."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if isinstance(value, argparse.Namespace | Placeholder):
        return [*vars(value).keys(), *vars(value).values()]
    if isinstance(value, int) and value.bit_length() > _BITS:
        raise Unbounded(f"an integer of {value.bit_length()} bits")
    return []


def is_shape(found: Any) -> bool:
    """Whether an object is a shape or an offset: at most 64 numbers that are not negative."""
    if type(found) is not torch.Size and not (
        isinstance(found, tuple | list) and all(type(n) is int for n in found)
    ):
        return False
    return len(found) <= 64 and min(found, default=0) >= 0 and max(found, default=0) < 1 << 60


def require_shapes(*found: Any) -> None:
    """Require that objects are shapes or offsets.

    Raises:
        Unbounded: One is not.
    """
    for one in found:
        if not is_shape(one):
            raise Unbounded("what should be a shape is none")
