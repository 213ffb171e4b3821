"""Where a rank's shard of a parameter lies in the unsharded parameter. Pure arithmetic.

Megatron cuts a parameter twice: tensor parallelism by rows or columns, then the distributed
optimizer by a range of the flattened remainder. A decision that depends on an element's position
must not depend on either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import PlanError
from .schema import Count


@dataclass(frozen=True)
class GlobalIndex:
    """Where a run of elements lies in the unsharded, flattened parameter.

    Element j of the run is element ``start + j`` of a block whose rows of ``row_length`` elements
    begin at ``base``, ``base + row_stride``, ``base + 2 * row_stride``, ...

    Args:
        start: Of the run's first element in the block.
        base: Index of the block's first element in the unsharded parameter.
        row_length: Elements of a row; 0 if the block is one run of elements.
        row_stride: From one row's first element to the next one's.
    """

    start: int = 0
    base: int = 0
    row_length: int = 0
    row_stride: int = 0


#: A tensor that holds the parameter from its first element on.
WHOLE = GlobalIndex()


@dataclass(frozen=True)
class Block:
    """A part of a tensor-parallel shard, in the shard's order.

    Args:
        length: Elements.
        base: Element of the parameter at which the first row begins.
        row_length: Elements of a row; 0 where the block is one run.
        row_stride: Elements from one row's beginning to the next one's.
    """

    length: Count
    base: Count = 0
    row_length: Count = 0
    row_stride: Count = 0


@dataclass(frozen=True)
class Run:
    """Elements ``begin`` to ``end`` of a rank's flattened shard, and where they lie."""

    begin: int
    end: int
    index: GlobalIndex


def runs(blocks: Sequence[Block], begin: int, end: int) -> Iterator[Run]:
    """Elements ``begin`` to ``end`` of a shard of these blocks, a run for each block they touch.

    The runs count from ``begin``: they are ranges of the rank's own flattened tensor.
    """
    at = 0
    for block in blocks:
        first, last = max(begin, at), min(end, at + block.length)
        if first < last:
            index = GlobalIndex(first - at, block.base, block.row_length, block.row_stride)
            yield Run(first - begin, last - begin, index)
        at += block.length


def block_of(
    shape: Sequence[int], offset: Sequence[int], local: Sequence[int], first_row: int = 0
) -> Block:
    """The block of a box that is cut from the unsharded parameter along at most one dimension.

    Args:
        shape: Of the matrix the box is cut from.
        offset: Of the box's first element, in elements along each dimension.
        local: Shape of the box.
        first_row: Row of the unsharded parameter at which the matrix begins, if it is one of
            several that are stored one after the other along dimension 0.

    Raises:
        PlanError: The box is cut along more than one dimension.
    """
    cut = [d for d, (n, whole) in enumerate(zip(local, shape, strict=True)) if n != whole]
    begin = first_row * math.prod(shape[1:])
    if not cut:
        return Block(math.prod(local), begin)
    if len(cut) > 1:
        raise PlanError(
            f"a shard of shape {tuple(local)} at {tuple(offset)} of {tuple(shape)} is cut along "
            f"dimensions {cut}; expected one"
        )
    dim = cut[0]
    inner = math.prod(shape[dim + 1 :])
    length, stride = local[dim] * inner, shape[dim] * inner
    base = begin + offset[dim] * inner
    if dim == 0:
        return Block(length, base)
    return Block(math.prod(local), base, length, stride)


def within(run: Run, first: int, last: int) -> Run | None:
    """The part of a run that lies between two elements of the unsharded, flattened parameter.

    Args:
        run: Of a rank's shard.
        first: Element of the unsharded parameter.
        last: One past the last.
    """
    index, length = run.index, run.end - run.begin
    begin = min(max(_before(index, first) - index.start, 0), length)
    end = min(max(_before(index, last) - index.start, 0), length)
    if begin >= end:
        return None
    moved = GlobalIndex(index.start + begin, index.base, index.row_length, index.row_stride)
    return Run(run.begin + begin, run.begin + end, moved)


def _before(index: GlobalIndex, element: int) -> int:
    """How many elements of a block lie before an element of the unsharded parameter."""
    distance = element - index.base
    if distance <= 0 or not index.row_length:
        return max(distance, 0)
    rows, rest = divmod(distance, index.row_stride)
    return rows * index.row_length + min(rest, index.row_length)
