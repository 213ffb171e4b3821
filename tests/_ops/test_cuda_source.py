"""The CUDA kernels' source, run on the CPU: what can be known of it without a GPU."""

from __future__ import annotations

import itertools
import math
import shutil

import pytest
import torch

from megatron_ext import _ops
from megatron_ext._ops.segments import Segment, Statistics, encode
from megatron_ext.base.placement import GlobalIndex
from megatron_ext.rules.batch_size import BatchSize
from megatron_ext.rules.elementwise import Keep, Scale
from tests.support import emulation
from tests.support.moments import (
    DTYPES,
    REFERENCE,
    Kernel,
    moments,
    rule_pairs,
    same_bits,
    weight_pairs,
)

RULES = rule_pairs()

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Kernel:
    emulation.load(tmp_path_factory.mktemp("emulated"))
    ops = torch.ops.megatron_ext_emulated
    return Kernel(
        "emulated", "cpu", ops.transform_moments_, ops.magnitude_histogram, ops.compare_weights
    )


def placed(x: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values, `offset` elements behind a 16-byte address."""
    return torch.empty(offset + len(x), dtype=x.dtype)[offset:].copy_(x)


def assert_equal(
    kernel: Kernel, segments: list[Segment], *pairs: tuple[torch.Tensor, torch.Tensor]
) -> None:
    for statistics in Statistics:
        mine = [[placed(x, 3 * i) for i, x in enumerate(xs)] for xs in zip(*pairs, strict=True)]
        theirs = [[x.clone() for x in xs] for xs in zip(*pairs, strict=True)]
        found = kernel.run(*mine, segments, statistics)
        expected = REFERENCE.run(*theirs, segments, statistics)
        for a, b in zip(itertools.chain(*mine), itertools.chain(*theirs), strict=True):
            assert same_bits(a, b)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_over_several_chunks_and_tensors_aligned_or_not(
    kernel: Kernel, name: str
) -> None:
    where = GlobalIndex(start=5, base=1000, row_length=37, row_stride=111)
    segments = [
        Segment(0, 3, 40_000, *RULES[name], where, 9),
        Segment(0, 40_000, 70_000, Scale(0.5), Keep()),
        Segment(2, 0, 70, *RULES[name], where, 9),
        Segment(3, 1, 2, *RULES[name], where, 9),
    ]
    sizes = (70_001, 12, 70, 9)
    assert_equal(kernel, segments, *(moments(n, torch.float32, torch.float32, n) for n in sizes))


@pytest.mark.parametrize("name", RULES)
def test_every_rule_in_every_pair_of_dtypes(kernel: Kernel, name: str) -> None:
    """In one launch, as a load changes all parameters of a device."""
    pairs = [moments(n, m, v) for m, v in itertools.product(DTYPES, DTYPES) for n in (2501, 1500)]
    assert len(pairs) == 18
    segments = [Segment(i, i % 2, len(m) - 1, *RULES[name]) for i, (m, _) in enumerate(pairs)]
    assert_equal(kernel, segments, *pairs)


@pytest.mark.parametrize("rules", [(Keep(), Keep()), (Scale(0.5), Scale(0.25)),
                                   (Keep(), BatchSize(2.0, (0.9, 0.95), 9))])  # fmt: skip
def test_what_is_rare_is_counted_wherever_it_is(kernel: Kernel, rules: tuple) -> None:
    """One in a vector of its own: the kernel looks for it in a sum first."""
    values = [-1e-6, -0.0, math.nan, math.inf, -math.inf, 3e38, 1e-40]
    m, v = torch.ones(70_001), torch.full((70_001,), 0.5)
    for i, value in enumerate(values):
        m[1000 * i + 5], v[1000 * i + 505] = value, value
    pairs = [(m.to(a), v.to(b)) for a, b in itertools.product(DTYPES, DTYPES)]
    segments = [Segment(i, 3, 70_000, *rules) for i in range(len(pairs))]
    assert_equal(kernel, segments, *pairs)


def test_a_launch_leaves_its_table_as_it_found_it(kernel: Kernel) -> None:
    """The counters of the chunks are zero again, whatever was counted."""
    ops = torch.ops.megatron_ext_emulated
    pairs = [moments(n, torch.float32, torch.bfloat16, n) for n in (70_001, 9, 0, 40_000)]
    mine, theirs = ([[x.clone() for x in xs] for xs in zip(*pairs, strict=True)] for _ in range(2))
    segments = [Segment(i, 0, len(x), Scale(0.5), Scale(0.25)) for i, x in enumerate(mine[0])]
    table, header = ops.launch_table(*mine, *encode(segments))
    for statistics in (*Statistics, *Statistics):
        found = ops.transform_prepared_(table, header, int(statistics))
        expected = REFERENCE.run(*theirs, segments, statistics)
        for a, b in zip(itertools.chain(*mine), itertools.chain(*theirs), strict=True):
            assert same_bits(a, b)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0, equal_nan=True)


def test_neither_the_address_nor_repetition_shows_in_a_bit(kernel: Kernel) -> None:
    m, v = moments(70_000, torch.float32, torch.bfloat16)
    results = set()
    for offset in (0, 1, 2, 3, 0):
        m_here, v_here = placed(m[20:], offset), placed(v[20:], 2 * offset)
        found = kernel.run([m_here], [v_here], [Segment(0, 1, 69_900, Scale(0.7), Scale(0.49))])
        results.add(found.numpy().tobytes())
    assert len(results) == 1


def test_weights_are_compared_over_several_chunks_and_tensors_aligned_or_not(
    kernel: Kernel,
) -> None:
    pairs = weight_pairs((70_001, 12))
    expected = REFERENCE.compare(*map(list, zip(*pairs, strict=True)))
    assert len(expected) == 18
    assert (expected[:, 0] > 0).all()
    for offset in (0, 1, 8):
        mine = [
            [placed(x, offset * i) for i, x in enumerate(xs)] for xs in zip(*pairs, strict=True)
        ]
        assert torch.equal(kernel.compare(*mine), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_histogram_finds_the_threshold(
    kernel: Kernel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = moments(40_000, dtype, dtype)[0].nan_to_num()
    ranges = torch.tensor([[0, 5, 39_000, 0], [0, 39_000, 40_000, 1]])
    quantiles = torch.tensor([0.3, 0.9], dtype=torch.float64)
    expected = _ops.magnitude_thresholds([x], ranges, quantiles)
    monkeypatch.setattr(torch.ops, "megatron_ext", torch.ops.megatron_ext_emulated)
    assert torch.equal(_ops.magnitude_thresholds([x], ranges, quantiles), expected)
