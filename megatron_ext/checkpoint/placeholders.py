"""Placeholders for pickled objects whose classes are not imported."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

#: Values whose hash is computed at once.
_PLAIN = (str, int, float, bool, bytes, type(None))


class Sealed(type):
    """A class of classes that a pickle cannot change, as it can those of Python."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(f"{cls.__name__}.{name} cannot be set")


class Placeholder(metaclass=Sealed):
    """A pickled object whose class was not imported; equal if the pickled objects are equal.

    ``placeholder_class`` is the class's ``module.name``, and ``placeholder_arguments`` are the
    arguments of its call. The pickled state becomes attributes; a state that is not a dict is in
    ``placeholder_state``.
    """

    placeholder_class = ""
    placeholder_arguments: tuple[Any, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Placeholder:
        """Accept and keep any arguments."""
        made = object.__new__(cls)
        if args:
            made.__dict__["placeholder_arguments"] = args
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `__new__` keeps the arguments."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            if self.__dict__:
                self.__dict__.update(state)
            else:  # saves a copy: an index has millions of these objects
                self.__dict__ = state
        else:
            self.__dict__["placeholder_state"] = state

    # A pickle may fill a subclass of list or dict item by item.

    def append(self, item: Any) -> None:
        """Keep an item."""
        self.__dict__.setdefault("placeholder_items", []).append(item)

    def extend(self, items: Any) -> None:
        """Keep items."""
        self.__dict__.setdefault("placeholder_items", []).extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.append((key, value))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Placeholder)
            and self.placeholder_class == other.placeholder_class
            and self.__dict__ == other.__dict__
        )

    def __hash__(self) -> int:
        # As of a key: an enum's member, for example, or a class without arguments.
        if not all(type(a) in _PLAIN for a in self.placeholder_arguments):
            raise TypeError(f"a key that is a {self.placeholder_class} of other things than values")
        return hash((self.placeholder_class, self.placeholder_arguments))

    def __repr__(self) -> str:
        inside = [repr(a) for a in self.placeholder_arguments]
        inside += [f"{k}={v!r}" for k, v in self.__dict__.items() if k != "placeholder_arguments"]
        return f"{self.placeholder_class}({', '.join(inside)})"


class IndexPlaceholder(Placeholder):
    """torch's MetadataIndex; hashed by identity, because it is the key of up to a million items."""

    placeholder_class = "torch.distributed.checkpoint.metadata.MetadataIndex"
    offset: Any = None
    __hash__ = object.__hash__


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor of this shape."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


class TensorPlace(NamedTuple):
    """Position of a tensor's elements in a ``torch.save`` file.

    Args:
        dtype: The tensor's dtype.
        shape: The tensor's shape.
        stride: Its strides, in elements.
        start: Offset in the file, in bytes, at which the first element begins.
        end: Offset in bytes at which the storage ends.
        crc32: The stored CRC32 of the storage's bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    end: int
    crc32: int = 0


class StoragePlace(NamedTuple):
    """A tensor's storage in a ``torch.save`` file."""

    dtype: torch.dtype
    key: str


class TensorPlaceholder(Placeholder):
    """A tensor whose elements are not read."""

    placeholder_class = "torch.Tensor"
