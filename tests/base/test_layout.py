"""Shards partition the parameter, however it is cut."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_ext.base.placement import WHOLE, Block, GlobalIndex, Run, block_of, runs, within
from megatron_ext.errors import PlanError
from tests.support.groups import STRUCTURE  # noqa: F401 (its hypothesis profile)
from tests.support.shards import tensor_parallel


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
        blocks = tensor_parallel(shape, dim, ranks, rank, halves)
        length = sum(b.length for b in blocks)
        whole = elements(blocks, 0, length)
        cuts = sorted(data.draw(st.lists(st.integers(0, length), max_size=3)))
        parts = [elements(blocks, a, b) for a, b in itertools.pairwise([0, *cuts, length])]
        assert list(itertools.chain(*parts)) == whole
        found += whole
    assert sorted(found) == list(range(math.prod(shape)))


def test_a_column_shard_by_hand() -> None:
    blocks = tensor_parallel((2, 6), 1, 3, 1)
    assert elements(blocks, 0, 4) == [2, 3, 8, 9]
    assert elements(blocks, 1, 3) == [3, 8]


def test_a_gated_fc1_by_hand() -> None:
    # Gate rows 0 to 3, up rows 4 to 7; rank 1 of 2 holds gate rows 2, 3 and up rows 6, 7.
    blocks = tensor_parallel((8, 2), 0, 2, 1, halves=2)
    assert elements(blocks, 0, 8) == [4, 5, 6, 7, 12, 13, 14, 15]


def test_an_unsharded_parameter_is_whole() -> None:
    assert block_of((3, 5), (0, 0), (3, 5)) == Block(15)
    assert elements((Block(15),), 4, 9) == [4, 5, 6, 7, 8]
    assert index_of(WHOLE, 7) == 7


# --- boxes cut from the parameter


@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_box_cut_along_one_dimension_is_the_same_slice_of_the_parameter(
    data: st.DataObject, shape: list[int]
) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    first = data.draw(st.integers(0, shape[dim] - 1))
    length = data.draw(st.integers(1, shape[dim] - first))
    # The matrix is one of several along dimension 0 and begins at this row.
    first_row = data.draw(st.integers(0, 3))
    whole = np.arange((first_row + shape[0] + 2) * math.prod(shape[1:]))
    matrix = whole.reshape(-1, *shape[1:])[first_row : first_row + shape[0]]
    box = np.take(matrix, range(first, first + length), axis=dim)
    offset = [first if d == dim else 0 for d in range(len(shape))]
    block = block_of(shape, offset, box.shape, first_row)
    assert block.length == box.size
    assert elements((block,), 0, block.length) == box.ravel().tolist()


def test_a_box_cut_along_two_dimensions_is_refused() -> None:
    with pytest.raises(PlanError) as caught:
        block_of((4, 6), (2, 3), (2, 3))
    assert str(caught.value) == (
        "a shard of shape (2, 3) at (2, 3) of (4, 6) is cut along dimensions [0, 1]; expected one"
    )


@given(
    data=st.data(),
    ranks=st.integers(1, 3),
    halves=st.integers(1, 2),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_within_is_the_part_of_a_run_in_a_range_of_the_parameter(
    data: st.DataObject, ranks: int, halves: int, shape: list[int]
) -> None:
    dim = 0 if halves > 1 else data.draw(st.integers(0, len(shape) - 1))
    shape[dim] *= ranks * halves
    rank = data.draw(st.integers(0, ranks - 1))
    blocks = tensor_parallel(shape, dim, ranks, rank, halves)
    length = sum(b.length for b in blocks)
    begin = data.draw(st.integers(0, length))
    end = data.draw(st.integers(begin, length))
    rows = sorted(data.draw(st.tuples(*[st.integers(0, shape[0])] * 2)))
    first, last = (r * math.prod(shape[1:]) for r in rows)
    if data.draw(st.booleans()):
        first, last = sorted(data.draw(st.tuples(*[st.integers(-2, math.prod(shape) + 2)] * 2)))
    for run in runs(blocks, begin, end):
        part = within(run, first, last)
        where = [index_of(run.index, j) for j in range(run.end - run.begin)]
        inside = [run.begin + j for j, i in enumerate(where) if first <= i < last]
        if part is None:
            assert inside == []
            continue
        assert list(range(part.begin, part.end)) == inside
        there = [index_of(part.index, j) for j in range(part.end - part.begin)]
        assert there == [i for i in where if first <= i < last]


@given(data=st.data(), length=st.integers(0, 12), start=st.integers(0, 4))
def test_the_parts_of_a_run_in_neighbouring_ranges_are_the_run(
    data: st.DataObject, length: int, start: int
) -> None:
    row, stride = data.draw(st.sampled_from(((0, 0), (2, 6), (3, 3))))
    run = Run(5, 5 + length, GlobalIndex(start, 2, row, stride))
    assume(length > 0)
    last = index_of(run.index, length - 1) + 1
    cuts = sorted(data.draw(st.lists(st.integers(0, last), max_size=3)))
    parts = [within(run, a, b) for a, b in itertools.pairwise([0, *cuts, last])]
    found = [range(p.begin, p.end) for p in parts if p is not None]
    assert [i for r in found for i in r] == list(range(5, 5 + length))
