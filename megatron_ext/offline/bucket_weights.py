"""Recognise the weights of a model by their elements. Pure."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

#: How many elements are compared before all of them are.
_NEEDLE = 16


@dataclass(frozen=True)
class Weight:
    """A stored piece of a model's weights: what one rank holds of a parameter, or a half of it.

    Args:
        key: Key of the tensor in the store.
        offset: Position of the piece in the tensor.
        shape: Shape of the piece.
        name: Global name of the parameter.
        shard: Position of the piece in the parameter.
        dtype: Dtype of the elements.
        elements: Number of elements.
        needle: The first elements.
        digest: Hash of all elements.
    """

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    name: str
    shard: tuple[int, ...]
    dtype: torch.dtype
    elements: int
    needle: bytes
    digest: bytes


@dataclass(frozen=True)
class Slot:
    """A part of a bucket, and the weights that its master weights are.

    Args:
        begin: First element.
        end: One past the last element.
        candidates: Weights with these elements; more than one if they are equal.
    """

    begin: int
    end: int
    candidates: tuple[Weight, ...]


class Weights:
    """The weights of a model, found by their elements.

    Args:
        weights: All of them.
    """

    def __init__(self, weights: Iterable[Weight]) -> None:
        self.all = tuple(weights)
        pieces = Counter(weight.name for weight in self.all)
        #: The parameters that are stored in several pieces.
        self.in_pieces = frozenset(name for name, count in pieces.items() if count > 1)
        self._known: dict[torch.dtype, dict[int, dict[bytes, list[Weight]]]] = {}
        for weight in self.all:
            by_length = self._known.setdefault(weight.dtype, {})
            by_needle = by_length.setdefault(min(weight.elements, _NEEDLE), {})
            by_needle.setdefault(weight.needle, []).append(weight)

    def at(self, master: torch.Tensor, begin: int, dtype: torch.dtype) -> list[Slot]:
        """Find the weights that a bucket may hold from an element on, one slot for each length.

        Args:
            master: The bucket.
            begin: The element.
            dtype: Dtype of the model's weights.
        """
        by_length: dict[int, list[Weight]] = defaultdict(list)
        for length, known in self._known.get(dtype, {}).items():
            needle = bytes(_bytes(master[begin : begin + length].to(dtype)))
            for weight in known.get(needle, ()):
                if begin + weight.elements <= len(master):
                    by_length[weight.elements].append(weight)
        slots = []
        for length, weights in sorted(by_length.items()):
            digest = _digest(_bytes(master[begin : begin + length].to(dtype)))
            if equal := tuple(w for w in weights if w.digest == digest):
                slots.append(Slot(begin, begin + length, equal))
        return slots


def fingerprint(values: torch.Tensor) -> tuple[bytes, bytes]:
    """Return the first elements and the hash of all elements, for `Weight`."""
    data = _bytes(values)
    return data[: _NEEDLE * values.dtype.itemsize].tobytes(), _digest(data)


def _bytes(values: torch.Tensor) -> memoryview[int]:
    return memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())


def _digest(data: memoryview[int]) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
