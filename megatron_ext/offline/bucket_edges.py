"""How the index cuts a bucket into pieces. Pure."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .bucket_weights import Slot

#: Parameters begin at multiples of this (pad_param_start, core/optimizer/distrib_optimizer.py:548,
#: 0.19.2).
ALIGNMENT = 64


@dataclass(frozen=True)
class Edges:
    """What the index tells of a bucket: how it is cut into stored pieces.

    Every parameter begins and ends with a piece, but a piece may also begin where the part of the
    next data-parallel rank begins.

    Args:
        bounds: Elements at which a piece begins or ends.
        padding: Elements, in order, at which padding begins for certain.
    """

    bounds: Collection[int]
    padding: Sequence[int] = ()

    def inside(self, slot: Slot) -> bool:
        """Whether there is padding inside a part."""
        at = bisect.bisect_left(self.padding, slot.begin)
        return at < len(self.padding) and self.padding[at] < slot.end
