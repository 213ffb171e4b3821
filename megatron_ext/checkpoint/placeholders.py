"""What stands for an object of a pickle that is not built."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Inert:
    """Stands for an object of a class that was not imported; equal where the pickles were.

    ``inert_class`` is the class's ``module.name`` and ``inert_arguments`` what it was to be called
    with; the attributes are those of the pickled state, and a state that is no dict is in
    ``inert_state``.
    """

    inert_class = ""
    inert_arguments: tuple[Any, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Whatever it is called with."""
        made = object.__new__(cls)
        if args:
            made.__dict__["inert_arguments"] = args
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `__new__` keeps the arguments."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            if self.__dict__:
                self.__dict__.update(state)
            else:  # of an index there are millions
                self.__dict__ = state
        else:
            self.__dict__["inert_state"] = state

    # A pickle may fill a subclass of list or dict item by item.

    def append(self, item: Any) -> None:
        """Keep an item."""
        self.__dict__.setdefault("inert_items", []).append(item)

    def extend(self, items: Any) -> None:
        """Keep items."""
        self.__dict__.setdefault("inert_items", []).extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.append((key, value))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Inert)
            and self.inert_class == other.inert_class
            and self.__dict__ == other.__dict__
        )

    def __hash__(self) -> int:
        return hash((self.inert_class, repr(self.inert_arguments)))

    def __repr__(self) -> str:
        inside = [repr(a) for a in self.inert_arguments]
        inside += [f"{k}={v!r}" for k, v in self.__dict__.items() if k != "inert_arguments"]
        return f"{self.inert_class}({', '.join(inside)})"


class IndexPlaceholder(Inert):
    """torch's MetadataIndex: the key of a dict of up to a million, so hashed by identity."""

    inert_class = "torch.distributed.checkpoint.metadata.MetadataIndex"
    offset: Any = None
    __hash__ = object.__hash__


class TensorPlace(NamedTuple):
    """Where a tensor's elements are in a ``torch.save`` file.

    Args:
        dtype: Of an element.
        shape: In elements.
        stride: In elements.
        start: Byte in the file at which the first element begins.
        end: Byte at which the storage ends.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    end: int


class StoragePlace(NamedTuple):
    """A tensor's storage in a ``torch.save`` file."""

    dtype: torch.dtype
    key: str


class TensorPlaceholder(Inert):
    """Stands for a tensor, whose elements are not read."""

    inert_class = "torch.Tensor"
