"""Shards partition the parameter, however it is cut."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import PlanError
from megatron_ext.layout import WHOLE, Block, GlobalIndex, runs, tensor_parallel_blocks


def index_of(where: GlobalIndex, j: int) -> int:
    """The documented meaning of a global index, element by element."""
    i = where.start + j
    if where.row_length == 0:
        return where.base + i
    return where.base + i // where.row_length * where.row_stride + i % where.row_length


def elements(blocks: tuple[Block, ...], begin: int, end: int) -> list[int]:
    out: list[int] = []
    for run in runs(blocks, begin, end):
        assert run.begin == len(out)
        out += [index_of(run.index, j) for j in range(run.end - run.begin)]
    return out


@given(
    data=st.data(),
    ranks=st.integers(1, 4),
    halves=st.integers(1, 2),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_the_shards_of_all_ranks_are_the_parameter(
    data: st.DataObject, ranks: int, halves: int, shape: list[int]
) -> None:
    dim = 0 if halves > 1 else data.draw(st.integers(0, len(shape) - 1))
    shape[dim] *= ranks * halves
    found = []
    for rank in range(ranks):
        blocks = tensor_parallel_blocks(shape, dim, ranks, rank, halves)
        length = sum(b.length for b in blocks)
        whole = elements(blocks, 0, length)
        cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=3)))
        parts = [elements(blocks, a, b) for a, b in itertools.pairwise([0, *cuts, length])]
        assert list(itertools.chain(*parts)) == whole
        found += whole
    assert sorted(found) == list(range(math.prod(shape)))


def test_a_column_shard_by_hand() -> None:
    blocks = tensor_parallel_blocks((2, 6), 1, 3, 1)
    assert elements(blocks, 0, 4) == [2, 3, 8, 9]
    assert elements(blocks, 1, 3) == [3, 8]


def test_a_gated_fc1_by_hand() -> None:
    # Gate rows 0 to 3, up rows 4 to 7; rank 1 of 2 holds gate rows 2, 3 and up rows 6, 7.
    blocks = tensor_parallel_blocks((8, 2), 0, 2, 1, halves=2)
    assert elements(blocks, 0, 8) == [4, 5, 6, 7, 12, 13, 14, 15]


def test_an_unsharded_parameter_is_whole() -> None:
    assert tensor_parallel_blocks((3, 5), None, 4, 2) == (Block(15),)
    assert elements((Block(15),), 4, 9) == [4, 5, 6, 7, 8]
    assert index_of(WHOLE, 7) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((7, 4), 0, 2, 0), "cannot be cut along dimension 0 into 2 equal shards"),
        (((6, 4), 0, 2, 0, 2), "into 2 equal shards of 2 matrices each"),
        (((8, 4), 1, 2, 0, 2), "cannot be cut along dimension 1"),
        (((8, 4), 2, 2, 0), "no shard 0 of 2 along dimension 2"),
        (((8, 4), 0, 2, 2), "no shard 2 of 2"),
    ],
)
def test_what_cannot_be_cut_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        tensor_parallel_blocks(*arguments)
