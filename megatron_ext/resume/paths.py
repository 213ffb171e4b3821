"""Entries of a nested state dict, by their paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: The keys and positions that lead to an entry.
Path = tuple[Any, ...]


def walk(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every entry of a sharded state dict with its path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from walk(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from walk(inner, (*path, index))
    else:
        yield path, value


def value_at(value: Any, path: Path) -> Any:
    """Return what a path leads to."""
    for step in path:
        value = value[step]
    return value


def put_at(value: Any, path: Path, new: Any) -> None:
    """Put a value where a path leads; its container exists."""
    value_at(value, path[:-1])[path[-1]] = new
