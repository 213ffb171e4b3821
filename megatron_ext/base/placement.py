"""Where a rank's shard of a parameter lies in the unsharded parameter. Pure arithmetic.

Megatron cuts a parameter twice: tensor parallelism cuts rows or columns, then the distributed
optimizer cuts the flattened rest into ranges. A rule that depends on an element's position must
give the same result for every such cut.
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
        start: Index of the run's first element in the block.
        base: Index of the block's first element in the unsharded parameter.
        row_length: Elements in a row; 0 if the block is contiguous.
        row_stride: Elements from the start of one row to the start of the next.
    """

    start: int = 0
    base: int = 0
    row_length: int = 0
    row_stride: int = 0


#: The index of a tensor that holds the parameter from its first element on.
WHOLE = GlobalIndex()


@dataclass(frozen=True)
class Block:
    """A part of a tensor-parallel shard; the parts follow each other in the shard's order.

    Args:
        length: Number of elements.
        base: As in `GlobalIndex`.
        row_length: As in `GlobalIndex`.
        row_stride: As in `GlobalIndex`.
    """

    length: Count
    base: Count = 0
    row_length: Count = 0
    row_stride: Count = 0


@dataclass(frozen=True)
class Run:
    """Elements ``begin`` to ``end`` of a rank's flattened shard and their global position."""

    begin: int
    end: int
    index: GlobalIndex


def runs(blocks: Sequence[Block], begin: int, end: int) -> Iterator[Run]:
    """Split elements ``begin`` to ``end`` of a shard into one run per block.

    The runs count from ``begin``, so they are ranges of the rank's own flattened tensor.

    Args:
        blocks: The blocks of the tensor-parallel shard, in its order.
        begin: First element in the shard.
        end: One past the last element.
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
    """Return the block of a shard that is cut from a matrix along at most one dimension.

    Args:
        shape: Shape of the matrix.
        offset: Position of the shard's first element along each dimension.
        local: Shape of the shard.
        first_row: Row of the unsharded parameter at which the matrix begins, if the parameter
            holds several matrices one after the other along dimension 0.

    Raises:
        PlanError: The shard is cut along more than one dimension.
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
    """Return the part of a run between two elements of the flattened, unsharded parameter.

    Args:
        run: A run of a rank's shard.
        first: First element in the unsharded parameter.
        last: One past the last element.

    Returns:
        The part, or None if the run has no such element.
    """
    index, length = run.index, run.end - run.begin
    begin = min(max(_before(index, first) - index.start, 0), length)
    end = min(max(_before(index, last) - index.start, 0), length)
    if begin >= end:
        return None
    moved = GlobalIndex(index.start + begin, index.base, index.row_length, index.row_stride)
    return Run(run.begin + begin, run.begin + end, moved)


def _before(index: GlobalIndex, element: int) -> int:
    """Count the elements of a block that lie before an element of the unsharded parameter."""
    distance = element - index.base
    if distance <= 0 or not index.row_length:
        return max(distance, 0)
    rows, rest = divmod(distance, index.row_stride)
    return rows * index.row_length + min(rest, index.row_length)
