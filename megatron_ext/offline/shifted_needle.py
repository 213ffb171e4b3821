"""Find a parameter's own elements in what is stored under its name. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch

#: Elements that are looked for, and how many different values they must have: norms that have
#: hardly moved from one are found in many places.
_NEEDLE, _VALUES = 16, 8


def shift_of(stored: torch.Tensor, weights: torch.Tensor) -> int | None:
    """Return by how many elements a parameter's stored elements come late; None if unclear.

    Args:
        stored: The bits of what is stored under its name.
        weights: The bits of its weights.
    """
    data, width = weights.numpy().tobytes(), weights.itemsize
    votes: Counter[int] = Counter()
    if (last := len(stored) - _NEEDLE) < 0:
        return None
    # If the shift is large, only the first elements are the parameter's own.
    near = [_NEEDLE << number for number in range(0, last.bit_length(), 2)]
    for at in sorted({0, *near, *(last * part // 4 for part in range(1, 5))}):
        needle = stored[at : at + _NEEDLE]
        if at > last or len(needle.unique()) < _VALUES:
            continue
        places = list(_places(data, needle.numpy().tobytes(), width))
        if len(places) == 1 and places[0] >= at:
            votes[places[0] - at] += 1
    return votes.most_common(1)[0][0] if votes else None


def _places(data: bytes, needle: bytes, width: int) -> Iterator[int]:
    at = data.find(needle)
    while at >= 0:
        if at % width == 0:
            yield at // width
        at = data.find(needle, at + 1)
