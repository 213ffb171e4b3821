"""Which layouts the weights prove, on a buffer made here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_ext.offline import convert_shifted
from megatron_ext.offline.shifted_held import Held
from megatron_ext.offline.shifted_proof import find
from megatron_ext.offline.shifted_ranks import Ranks


class Reader:
    """The weights of a buffer and what stock stores of it.

    Args:
        weights: The weights of each parameter.
        places: Begin and shift of each.
    """

    def __init__(self, weights: list[torch.Tensor], places: list[tuple[int, int]]) -> None:
        self._weights = weights
        length = max(
            begin - shift + len(w) for w, (begin, shift) in zip(weights, places, strict=True)
        )
        world = torch.zeros(length + 10_000)
        for w, (begin, shift) in zip(weights, places, strict=True):
            world[begin - shift : begin - shift + len(w)] = w
        self.stored = [
            world[begin : begin + len(w)].clone()
            for w, (begin, _) in zip(weights, places, strict=True)
        ]

    def weights(self, held: Any) -> torch.Tensor:
        return self._weights[int(held.key)]

    def rounded(self, held: Any) -> torch.Tensor:
        return self.stored[int(held.key)]


def buffer_of(sizes: list[int]) -> list[Held]:
    return [
        Held(str(n), (), f"parameter {n}", (((0,), (size,)),), torch.float32)
        for n, size in enumerate(sizes)
    ]


SIZES = [1000, 1000, 100, 100]
#: The first two are a bucket each.
PLACES = [(0, 0), (1024, 24), (2048, 48), (2176, 48)]


def weights_of(last: torch.Tensor) -> list[torch.Tensor]:
    made = [
        torch.rand(size, generator=torch.Generator().manual_seed(n)) for n, size in enumerate(SIZES)
    ]
    return [*made[:2], last, last.clone()]


@pytest.mark.parametrize("args", [{}, {"world_size": 1}])
def test_equal_weights_whose_bucket_is_not_certain_are_not_put_back(args: dict[str, int]) -> None:
    """Zeros at the end: a bucket may end between them, or not."""
    if args:
        args |= {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    for last, certain in ((torch.zeros(100), False), (torch.rand(100), True)):
        reader: Any = Reader(weights_of(last), PLACES)
        found = find(reader, buffer_of(SIZES), Ranks(args))
        assert not found.in_place
        assert tuple((p.begin, p.shift) for p in found.layouts[0])[:2] == tuple(PLACES[:2])
        lost, reset = convert_shifted._losses([convert_shifted._plan(found)])
        assert (reset == ()) == certain
        assert set(reset) <= {"parameter 2", "parameter 3"}
        assert dict(lost)["parameter 1"] == 24


def test_what_no_layout_explains_is_named() -> None:
    weights = weights_of(torch.rand(100))
    reader: Any = Reader(weights, PLACES)
    reader.stored[0][500] += 1
    found = find(reader, buffer_of(SIZES), Ranks({}))
    assert found.layouts == []
    assert found.wrong == {"parameter 0": 1}
    # What is right where it is needs no layout.
    reader.stored = [w.clone() for w in weights]
    assert find(reader, buffer_of(SIZES), Ranks({})).in_place
