"""The moment ops: every rule against numpy, the kernels against each other bit for bit."""

from __future__ import annotations

import gc
import itertools
import math
import sys
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from megatron_ext import _ops
from megatron_ext._ops import Transform, native, reference, schema
from megatron_ext._ops.segments import COLUMNS, Segment, Statistics, encode
from megatron_ext.base.placement import GlobalIndex, runs
from megatron_ext.rules import registry
from megatron_ext.rules.base import ElementRule
from megatron_ext.rules.batch_size import BatchSize
from megatron_ext.rules.elementwise import Fill, Keep, Scale
from megatron_ext.rules.prune import PruneRandom
from tests.support.moments import (
    DTYPES,
    REFERENCE,
    Kernel,
    active,
    expected_differences,
    expected_statistics,
    moments,
    oracle,
    rule_pairs,
    same_bits,
    weight_pairs,
)
from tests.support.shards import tensor_parallel

RULES = rule_pairs()
GPU_MARKS = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
DEVICES = ["cpu", pytest.param("cuda", marks=GPU_MARKS)]


def needs_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in GPU_MARKS:
        test = mark(test)
    return test


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def kernel(device: str) -> Kernel:
    return active(device)


def assert_statistics(found: torch.Tensor, expected: list[float]) -> None:
    np.testing.assert_allclose(found.tolist()[:2], expected[:2], rtol=1e-6)
    assert found.tolist()[2:] == expected[2:]


# Which kernel runs.


def test_the_dispatcher_has_a_compiled_cpu_kernel_for_every_op() -> None:
    assert len(schema.OPS) == 5
    for name in schema.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"megatron_ext::{name}", "CPU")
    assert native.kernel("cpu").native


@needs_gpu
def test_the_dispatcher_has_a_compiled_cuda_kernel_for_every_op() -> None:
    assert native.kernel("cuda").native, native.kernel("cuda").reason


def python_calls(run: Callable[[], object]) -> list[str]:
    """The files of this package in which a Python function was called."""
    called = []

    def profile(frame: object, event: str, _: object) -> None:
        file = frame.f_code.co_filename  # type: ignore[attr-defined]
        if event == "call" and "megatron_ext" in file and "tests" not in file:
            called.append(f"{file}:{frame.f_code.co_name}")  # type: ignore[attr-defined]

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return called


def test_no_python_runs_inside_the_op(kernel: Kernel) -> None:
    m, v = (x.to(kernel.device) for x in moments(100, torch.float32, torch.float32))
    table = encode([Segment(0, 0, 100, Scale(2.0), Scale(4.0))])
    assert python_calls(lambda: kernel.transform([m], [v], *table, 2)) == []
    ranges, prefixes = torch.tensor([[0, 0, 100, 0]]), torch.zeros(1, dtype=torch.int64)
    prefixes = prefixes.to(kernel.device)
    assert python_calls(lambda: kernel.histogram([m], ranges, prefixes, 0)) == []
    assert python_calls(lambda: kernel.compare([m], [v])) == []
    # The check can fail: the reference is Python.
    assert python_calls(lambda: REFERENCE.transform([m.cpu()], [v.cpu()], *table, 2)) != []


# What the rules do.


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("run", [REFERENCE, active("cpu")], ids=lambda k: k.name)
def test_a_rule_is_its_formula_in_float64(run: Kernel, name: str) -> None:
    n, parameter = 4000, 77
    generator = torch.Generator().manual_seed(1)
    m = torch.randn(n, generator=generator) * 1e-3
    v = (m**2) * (1 + 9 * torch.rand(n, generator=generator))
    rules = RULES[name]
    old = m.clone(), v.clone()
    run.run([m], [v], [Segment(0, 0, n, *rules, parameter=parameter)])
    index = np.arange(n)
    for rule, new, x in zip(rules, (m, v), old, strict=True):
        expected = oracle(rule, x.numpy(), old[0].numpy(), index, parameter)
        # The batch-size rule subtracts numbers of the size of v.
        atol = 4e-7 * np.abs(x.numpy()) if isinstance(rule, BatchSize) else 0.0
        error = np.abs(new.numpy() - expected)
        assert np.all(error <= 3e-7 * np.abs(expected) + atol)


def test_the_random_rule_prunes_about_its_share_and_depends_on_seed_and_parameter() -> None:
    n = 20000

    def kept(seed: int, parameter: int, probability: float = 0.25) -> torch.Tensor:
        m, v = torch.ones(n), torch.ones(n)
        rule = PruneRandom(probability, seed)
        active("cpu").run([m], [v], [Segment(0, 0, n, rule, rule, parameter=parameter)])
        assert torch.equal(m, v)
        return m

    one = kept(1, 1)
    assert abs(one.mean().item() - 0.75) < 4 * math.sqrt(0.25 * 0.75 / n)
    for other in (kept(2, 1), kept(1, 2), kept(-1, 1)):
        assert abs((one * other).mean().item() - 0.75**2) < 0.02
    assert kept(1, 1, 0.0).sum() == n
    assert kept(1, 1, 1.0).sum() == 0


@pytest.mark.parametrize(
    ("ratio", "noise", "ours"),
    [
        *[(4.0, r, x) for r, x in ((0.05, 0.272), (0.3, 0.350), (1.0, 1.250))],
        *[(k, 0.0, x / k) for k, x in ((0.25, 0.98), (4.0, 1.08), (16.0, 1.39))],
    ],
)
def test_the_batch_size_rule_has_the_bias_that_is_documented(
    ratio: float, noise: float, ours: float
) -> None:
    # Adam at b2 = 0.95 on gradients of mean `noise` and variance 1, stationary.
    n, (b1, b2), steps = 100_000, (0.9, 0.95), 200
    generator = torch.Generator().manual_seed(0)
    m, v = torch.zeros(n), torch.zeros(n)
    for _ in range(steps):
        g = noise + torch.randn(n, generator=generator)
        m.mul_(b1).add_(g, alpha=1 - b1)
        v.mul_(b2).add_(g * g, alpha=1 - b2)
    active("cpu").run([m], [v], [Segment(0, 0, n, Keep(), BatchSize(ratio, (b1, b2), steps))])
    assert v.mean().item() == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("m_type", "v_type"), list(itertools.product(DTYPES, DTYPES)))
def test_the_kernel_equals_the_reference_bit_for_bit(
    kernel: Kernel, name: str, m_type: torch.dtype, v_type: torch.dtype
) -> None:
    n = 70_001  # three chunks
    m, v = moments(n, m_type, v_type)
    where = GlobalIndex(start=5, base=1000, row_length=37, row_stride=111)
    segments = [
        Segment(0, 3, 40_000, *RULES[name], where, 9),
        Segment(0, 40_000, n - 2, Scale(0.5), Keep(), where, 9),
    ]
    mine, theirs = ([x.clone().to(d) for x in (m, v)] for d in (kernel.device, "cpu"))
    for statistics in Statistics:
        found = kernel.run([mine[0]], [mine[1]], segments, statistics)
        expected = REFERENCE.run([theirs[0]], [theirs[1]], segments, statistics)
        for a, b in zip(mine, theirs, strict=True):
            assert same_bits(a.cpu(), b)
        assert found.shape == expected.shape == (1 if statistics else 0, 2, 5)
        assert found.device.type == kernel.device
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=0, equal_nan=True)


finite = st.floats(width=32)
rules_m = st.sampled_from([pair[0] for pair in RULES.values()])
rules_v = st.sampled_from([pair[1] for pair in RULES.values()])


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[tuple[list[float], list[float], int, int]], list[Segment]]:
    """Tensors of some lengths in memory of some alignment, and segments that do not overlap."""
    tensors = []
    segments: list[Segment] = []
    for t in range(draw(st.integers(1, 3))):
        n = draw(st.integers(0, 40))
        values = st.lists(finite, min_size=n, max_size=n)
        tensors.append(
            (draw(values), draw(values), draw(st.integers(0, 9)), draw(st.integers(0, 9)))
        )
        cuts = sorted(draw(st.lists(st.integers(0, n), max_size=5)))
        for begin, end in itertools.pairwise(cuts):
            m, v = draw(rules_m), draw(rules_v)
            m = Keep() if v.kind == "joint" else m
            where = GlobalIndex(*draw(st.tuples(*[st.integers(0, 1 << 40)] * 4)))
            segments.append(
                Segment(t, begin, end, m, v, where, draw(st.integers(0, (1 << 64) - 1)))
            )
    return tensors, draw(st.permutations(segments))


def in_memory(values: list[float], offset: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    storage = torch.zeros(offset + len(values), dtype=dtype, device=device)
    storage[offset:] = torch.tensor(values, dtype=torch.float32).to(dtype)
    return storage[offset:]


def assert_case(kernel: Kernel, case: tuple, m_type: torch.dtype, v_type: torch.dtype) -> None:
    tensors, segments = case

    def build(device: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return (
            [in_memory(m, at, m_type, device) for m, _, at, _ in tensors],
            [in_memory(v, at, v_type, device) for _, v, _, at in tensors],
        )

    (m, v), (m_ref, v_ref), (m_old, v_old) = build(kernel.device), build("cpu"), build("cpu")
    found = kernel.run(m, v, segments)
    expected = REFERENCE.run(m_ref, v_ref, segments)
    for a, b in zip([*m, *v], [*m_ref, *v_ref], strict=True):
        assert same_bits(a.cpu(), b)
    for t in range(len(tensors)):
        covered = torch.zeros(len(m[t]), dtype=torch.bool)
        for s in segments:
            if s.tensor == t:
                covered[s.begin : s.end] = True
        for moment, (old, new) in enumerate(((m_old[t], m_ref[t]), (v_old[t], v_ref[t]))):
            assert same_bits(old[~covered], new[~covered])
            key = ("exp_avg", "exp_avg_sq")[moment]
            statistics = expected_statistics(old[covered], new[covered], key)
            assert_statistics(found[t, moment], statistics)
            assert_statistics(expected[t, moment], statistics)


@settings(max_examples=200, deadline=None)
@given(case=cases(), m_type=st.sampled_from(DTYPES), v_type=st.sampled_from(DTYPES))
@example(case=([], []), m_type=torch.float32, v_type=torch.float32)
@example(
    case=([([], [], 0, 0)], [Segment(0, 0, 0, Scale(2.0), Scale(2.0))]),
    m_type=torch.bfloat16,
    v_type=torch.float32,
)
def test_any_lengths_offsets_segments_and_values_on_the_cpu(
    case: tuple, m_type: torch.dtype, v_type: torch.dtype
) -> None:
    assert_case(active("cpu"), case, m_type, v_type)


@needs_gpu
@settings(max_examples=200, deadline=None)
@given(
    case=cases().filter(lambda c: any(c[0])),
    m_type=st.sampled_from(DTYPES),
    v_type=st.sampled_from(DTYPES),
)
def test_any_lengths_offsets_segments_and_values_on_the_gpu(
    case: tuple, m_type: torch.dtype, v_type: torch.dtype
) -> None:
    assert_case(active("cuda"), case, m_type, v_type)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 5, 7, 8])
def test_neither_address_nor_threads_nor_repetition_show_in_a_bit(
    kernel: Kernel, offset: int
) -> None:
    n = 200_003
    results = set()
    threads = torch.get_num_threads()
    try:
        for count, at in ((1, 0), (2, offset), (2, offset), (3, 0)):
            torch.set_num_threads(count)
            m, v = moments(n, torch.float32, torch.bfloat16)
            m, v = m[20:], v[20:]
            state = [torch.empty(at + len(x), dtype=x.dtype, device=kernel.device) for x in (m, v)]
            m_here, v_here = (s[at:].copy_(x) for s, x in zip(state, (m, v), strict=True))
            found = kernel.run([m_here], [v_here], [Segment(0, 1, n - 33, Scale(0.7), Scale(0.49))])
            results.add((found.cpu().numpy().tobytes(), m_here.cpu().numpy().tobytes()))
    finally:
        torch.set_num_threads(threads)
    assert len(results) == 1


def test_statistics_after_leave_out_what_needs_the_old_values(kernel: Kernel) -> None:
    m, v = (x.to(kernel.device) for x in moments(50, torch.float32, torch.float32))
    (row,) = kernel.run([m], [v], [Segment(0, 0, 50, Fill(0.0), Fill(2.0))], Statistics.AFTER)
    assert row.tolist() == [[-1.0, 0.0, 0.0, 0.0, -1.0], [-1.0, 200.0, 2.0, 0.0, -1.0]]


@pytest.mark.parametrize("statistics", [Statistics.AFTER, Statistics.BEFORE_AND_AFTER])
@pytest.mark.parametrize("rule", [Keep(), Scale(1.0), BatchSize(1.0, (0.9, 0.95), 100)])
def test_a_negative_exp_avg_sq_counts_with_what_is_not_finite(
    kernel: Kernel, rule: ElementRule, statistics: Statistics
) -> None:
    values = torch.tensor([-1e-6, -3e-45, -math.inf, math.inf, math.nan, -0.0, 0.0, 1.0])
    for n in (8, 7, 3, 1):
        m, v = torch.full((n,), -1.0), values[:n].clone()
        segments = [Segment(0, 0, n, Keep(), rule)]
        state = ([x.to(kernel.device)] for x in (m, v))
        found = kernel.run(*state, segments, statistics)
        assert found[0, :, 3].tolist() == [0.0, min(n, 5.0)]


def test_a_tensor_without_segments_counts_nothing(kernel: Kernel) -> None:
    tensors = [torch.ones(4, device=kernel.device) for _ in range(4)]
    found = kernel.run(tensors[:2], tensors[2:], [Segment(1, 0, 4, Scale(2.0), Keep())])
    assert found[0].tolist() == [[0.0] * 5] * 2
    assert found[1].tolist() == [[4.0, 16.0, 2.0, 0.0, 4.0], [4.0, 4.0, 1.0, 0.0, 0.0]]


# Sharding.


def shards_of(n: int, count: int, seed: int) -> list[tuple[int, int]]:
    cuts = sorted(np.random.default_rng(seed).integers(0, n + 1, count - 1).tolist())
    return list(itertools.pairwise([0, *cuts, n]))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_cutting_the_flat_state_anywhere_changes_no_bit(
    kernel: Kernel, name: str, count: int
) -> None:
    n = 5000
    m, v = moments(n, torch.float32, torch.float32)
    whole_m, whole_v = (x.clone().to(kernel.device) for x in (m, v))
    kernel.run([whole_m], [whole_v], [Segment(0, 0, n, *RULES[name], parameter=5)])
    for seed in range(5):
        parts = shards_of(n, count, seed)
        cut_m, cut_v = ([x[a:b].clone().to(kernel.device) for a, b in parts] for x in (m, v))
        segments = [
            Segment(i, 0, b - a, *RULES[name], GlobalIndex(start=a), 5)
            for i, (a, b) in enumerate(parts)
        ]
        kernel.run(cut_m, cut_v, segments)
        assert same_bits(torch.cat(cut_m).cpu(), whole_m.cpu())
        assert same_bits(torch.cat(cut_v).cpu(), whole_v.cpu())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    ("shape", "dim", "halves", "ranks"),
    [((24, 36), 1, 1, 2), ((24, 36), 1, 1, 3), ((24, 36), 0, 1, 4), ((24, 36), 0, 2, 2),
     ((24, 36), 0, 2, 3), ((6, 8, 10), 1, 1, 4)],
)  # fmt: skip
def test_tensor_parallel_shards_of_a_distributed_optimizer_give_the_same_bits(
    kernel: Kernel, name: str, shape: tuple[int, ...], dim: int, halves: int, ranks: int
) -> None:
    n = math.prod(shape)
    m, v = moments(n, torch.float32, torch.float32)
    whole_m, whole_v = (x.clone().to(kernel.device) for x in (m, v))
    kernel.run([whole_m], [whole_v], [Segment(0, 0, n, *RULES[name], parameter=8)])

    def local(x: torch.Tensor, rank: int) -> torch.Tensor:
        parts = x.view(shape).chunk(halves, 0) if halves > 1 else [x.view(shape)]
        return torch.cat([p.chunk(ranks, dim)[rank] for p in parts]).flatten()

    for rank in range(ranks):
        blocks = tensor_parallel(shape, dim, ranks, rank, halves)
        mine_m, mine_v = local(m, rank), local(v, rank)
        assert sum(b.length for b in blocks) == len(mine_m)
        for begin, end in shards_of(len(mine_m), 3, rank):
            shard_m = mine_m[begin:end].clone().to(kernel.device)
            shard_v = mine_v[begin:end].clone().to(kernel.device)
            kernel.run(
                [shard_m],
                [shard_v],
                [
                    Segment(0, r.begin, r.end, *RULES[name], r.index, 8)
                    for r in runs(blocks, begin, end)
                ],
            )
            assert same_bits(shard_m.cpu(), local(whole_m.cpu(), rank)[begin:end])
            assert same_bits(shard_v.cpu(), local(whole_v.cpu(), rank)[begin:end])


# The magnitude threshold.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", ["reference", "active"])
def test_the_threshold_is_numpys_lower_quantile(
    device: str, dtype: torch.dtype, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if run == "reference":
        monkeypatch.setattr(
            "torch.ops.megatron_ext.magnitude_histogram", REFERENCE.histogram, raising=False
        )
    generator = torch.Generator().manual_seed(2)
    sizes = [1, 0, 999, 40_001, 2, 3]
    tensors = [
        (torch.randn(n, generator=generator) * 10.0**-i).to(dtype) for i, n in enumerate(sizes)
    ]
    tensors[3][::3] = tensors[3][0]  # ties
    ranges = torch.tensor(
        [
            [0, 0, 1, 0],
            [2, 10, 900, 0],
            [3, 5, 40_000, 1],
            [2, 0, 999, 1],
            [4, 0, 2, 2],
            [1, 0, 0, 3],
        ]
    )
    members = {g: [r for r in ranges.tolist() if r[3] == g] for g in range(4)}
    for p in (0.0, 0.1, 0.5, 0.9, 0.999, 1.0):
        quantiles = torch.full((4,), p, dtype=torch.float64)
        found = _ops.magnitude_thresholds([x.to(device) for x in tensors], ranges, quantiles)
        assert found.device.type == device
        for g in range(3):
            values = np.concatenate(
                [tensors[t][a:b].float().abs().numpy() for t, a, b, _ in members[g]]
            )
            assert found[g].item() == np.quantile(values, p, method="lower"), (g, p)
        assert found[3] == 0.0  # no element


def test_the_threshold_of_more_than_16_million_elements(device: str) -> None:
    # torch.quantile refuses so many in most versions of torch.
    n = (1 << 24) + 3
    x = torch.arange(n, 0, -1, dtype=torch.int32).to(device).view(torch.float32)
    ranges, quantiles = torch.tensor([[0, 0, n, 0]]), torch.tensor([0.75], dtype=torch.float64)
    found = _ops.magnitude_thresholds([x], ranges, quantiles)
    assert found.view(torch.int32).item() == 1 + math.floor(0.75 * (n - 1))


def test_the_threshold_over_shards_adds_their_histograms_up() -> None:
    x = torch.randn(10_001, generator=torch.Generator().manual_seed(4))
    quantile = torch.tensor([0.3], dtype=torch.float64)
    ranges = torch.tensor([[0, 0, len(x), 0]])
    whole = _ops.magnitude_thresholds([x], ranges, quantile)
    parts = [x[:7000], x[7000:]]
    mine = torch.tensor([[0, 0, 7000, 0]])
    level = iter(range(3))

    def add_the_other(counts: torch.Tensor) -> None:
        number = next(level)
        key = parts[1].abs().view(torch.int32)
        target = whole.view(torch.int32).item()
        bits, shift = ((11, 20), (10, 10), (10, 0))[number]
        wanted = key[(key >> (bits + shift)) == (target >> (bits + shift))]
        for b in ((wanted >> shift) & ((1 << bits) - 1)).tolist():
            counts[0, b] += 1

    assert torch.equal(_ops.magnitude_thresholds([parts[0]], mine, quantile, add_the_other), whole)


# The comparison of master weights with weights.


@pytest.mark.parametrize("run", [REFERENCE, active("cpu")], ids=lambda k: k.name)
def test_weights_are_compared_in_every_pair_of_dtypes(run: Kernel) -> None:
    pairs = weight_pairs()
    found = run.compare(*map(list, zip(*pairs, strict=True)))
    assert found.shape == (36, 2)
    assert found.dtype == torch.int64
    for (master, weight), (count, bits) in zip(pairs, found.tolist(), strict=True):
        largest = torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
        assert (count, largest) == expected_differences(master, weight)
    assert found[:, 0].sum() > 9 * 400


def test_weights_compared_on_a_device_are_those_of_the_reference(kernel: Kernel) -> None:
    """Behind any address, as the shards of a distributed optimizer lie."""
    pairs = weight_pairs((70_001, 12))
    expected = REFERENCE.compare(*map(list, zip(*pairs, strict=True)))
    for offset in (0, 1, 8):
        mine = [
            [torch.cat([x[:offset], x]).to(kernel.device)[len(x[:offset]) :] for x in xs]
            for xs in zip(*pairs, strict=True)
        ]
        assert torch.equal(kernel.compare(*mine).cpu(), expected)


def test_equal_weights_have_no_difference(kernel: Kernel) -> None:
    special = torch.tensor([0.0, -0.0, 1e-40, math.nan, math.inf, -math.inf, 3.4e38, 1.00390625])
    master = special.repeat(5_000).to(kernel.device)
    weights = [master.to(dtype) for dtype in DTYPES]
    assert _ops.weight_differences([master] * 3, weights) == [(0, 0.0)] * 3
    flipped = weights[1].clone()
    flipped.view(torch.int16)[12_345] ^= 1
    (found,) = _ops.weight_differences([master], [flipped])
    assert found[0] == 1
    # The sign of a zero is a difference.
    zeros = torch.zeros(2, device=kernel.device)
    assert _ops.weight_differences([zeros], [-zeros]) == [(2, 0.0)]


@pytest.mark.parametrize("run", [REFERENCE, active("cpu")], ids=lambda k: k.name)
@pytest.mark.parametrize(
    ("master", "weights", "message"),
    [
        ([torch.ones(3)], [], "master has 1 tensors, weights 0"),
        ([torch.ones(3)], [torch.ones(4)], r"master\[0\] has 3 elements, weights\[0\] 4"),
        ([torch.ones(3, dtype=torch.int16)], [torch.ones(3)], r"master\[0\] is neither float32"),
        ([torch.ones(3)], [torch.ones(6)[::2]], r"weights\[0\] is not contiguous"),
    ],
)
def test_bad_input_of_the_comparison_is_refused(
    run: Kernel, master: list[torch.Tensor], weights: list[torch.Tensor], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        run.compare(master, weights)


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_a_quantile_outside_0_and_1_is_refused(p: float) -> None:
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        _ops.magnitude_thresholds(
            [torch.ones(3)], torch.tensor([[0, 0, 3, 0]]), torch.tensor([p], dtype=torch.float64)
        )


# The ops as torch sees them.

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("statistics", list(Statistics))
def test_opcheck_transform_moments(device: str, statistics: Statistics) -> None:
    m, v = zip(*(moments(n, torch.float32, torch.bfloat16) for n in (40, 60)), strict=True)
    # NaN compares unequal to itself in opcheck.
    m, v = ([x.nan_to_num(0.0, 1.0, 1.0).to(device) for x in xs] for xs in (m, v))
    table = encode([Segment(0, 1, 30, Scale(2.0), Scale(4.0)), Segment(1, 0, 60, Fill(), Keep())])
    result = opcheck(
        torch.ops.megatron_ext.transform_moments_,
        (m, v, *table, int(statistics)),
        test_utils=CHECKS,
    )
    assert set(result.values()) == {"SUCCESS"}


def test_opcheck_magnitude_histogram(device: str) -> None:
    x = torch.randn(50, device=device)
    prefixes = torch.zeros(2, dtype=torch.int64, device=device)
    arguments = ([x], torch.tensor([[0, 0, 20, 0], [0, 20, 50, 1]]), prefixes, 0)
    result = opcheck(torch.ops.megatron_ext.magnitude_histogram, arguments, test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


def test_opcheck_compare_weights(device: str) -> None:
    x = torch.randn(50, device=device)
    arguments = ([x, x], [x.bfloat16(), x + 1])
    result = opcheck(torch.ops.megatron_ext.compare_weights, arguments, test_utils=CHECKS)
    assert set(result.values()) == {"SUCCESS"}


def test_opcheck_launch_table_and_what_takes_it(device: str) -> None:
    m, v = torch.ones(9, device=device), torch.ones(9, device=device)
    arguments = ([m], [v], *encode([Segment(0, 0, 9, Scale(2.0), Keep())]))
    # A table holds addresses, so that neither op has a fake kernel.
    launch_table = torch.ops.megatron_ext.launch_table
    result = opcheck(launch_table, arguments, test_utils=CHECKS[:2])
    assert set(result.values()) == {"SUCCESS"}
    made = launch_table(*arguments)
    prepared = torch.ops.megatron_ext.transform_prepared_
    result = opcheck(prepared, (*made, 1), test_utils=CHECKS[1:2])
    assert set(result.values()) == {"SUCCESS"}


def test_the_op_compiles_into_one_graph(device: str) -> None:
    segments, coefficients = encode([Segment(0, 0, 9, Scale(2.0), Scale(3.0))])

    def step(m: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        torch.ops.megatron_ext.transform_moments_([m], [v], segments, coefficients, 1)
        return m + v

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    m, v = torch.ones(9, device=device), torch.ones(9, device=device)
    assert compiled(m, v).tolist() == [5.0] * 9
    assert m.tolist() == [2.0] * 9


# Bad input.


def bad(
    m: object = None, v: object = None, segments: object = None, coefficients: object = None,
    statistics: int = 0,
) -> tuple:  # fmt: skip
    good = encode([Segment(0, 0, 8, Scale(2.0), Scale(2.0))])
    return (
        [torch.ones(8)] if m is None else m,
        [torch.ones(8)] if v is None else v,
        good[0] if segments is None else segments,
        good[1] if coefficients is None else coefficients,
        statistics,
    )


def row(**columns: int) -> torch.Tensor:
    values = {"tensor": 0, "begin": 0, "end": 8, "exp_avg_rule": 1, "exp_avg_sq_rule": 1, **columns}
    return torch.tensor([[values.get(c, 0) for c in COLUMNS]])


def two(a: tuple[int, int], b: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    return encode([Segment(0, *a, Scale(2.0), Scale(2.0)), Segment(0, *b, Scale(2.0), Scale(2.0))])


NO_CODE = 250
shared = torch.ones(12)
overlapping = two((0, 5), (4, 8))
BAD: dict[str, tuple[tuple, str]] = {
    "lists of different length": (bad(v=[]), "exp_avg has 1 tensors, exp_avg_sq 0"),
    "pair of different length": (
        bad(v=[torch.ones(7)]), r"exp_avg\[0\] has 8 elements, exp_avg_sq\[0\] 7"),
    "not contiguous": (bad(m=[torch.ones(16)[::2]]), r"exp_avg\[0\] is not contiguous"),
    "dtype": (bad(v=[torch.ones(8).double()]), r"exp_avg_sq\[0\] is neither float32"),
    "shared memory": (
        bad(m=[shared[:8]], v=[shared[4:]]), r"exp_avg\[0\] and exp_avg_sq\[0\] share memory"),
    "no such tensor": (bad(segments=row(tensor=1)), "segment 0: there is no tensor 1, only 1"),
    "negative tensor": (bad(segments=row(tensor=-1)), "segment 0: there is no tensor -1"),
    "end": (bad(segments=row(end=9)), "segment 0: elements 0 to 9 are not within tensor 0 of 8"),
    "begin": (bad(segments=row(begin=-1)), "segment 0: elements -1 to 8 are not within"),
    "reversed": (bad(segments=row(begin=5, end=4)), "segment 0: elements 5 to 4 are not within"),
    "overlap": (bad(None, None, *overlapping), "segments overlap in tensor 0: 0 to 5 and 4 to 8"),
    "rule": (bad(segments=row(exp_avg_rule=NO_CODE)), "0: 250 is no rule for exp_avg"),
    "negative rule": (bad(segments=row(exp_avg_sq_rule=-1)), "-1 is no rule for exp_avg_sq"),
    "batch size for exp_avg": (bad(segments=row(exp_avg_rule=6)), "not for exp_avg"),
    "batch size beside": (bad(segments=row(exp_avg_sq_rule=6)), "must be kept beside it"),
    "start": (bad(segments=row(start=-1)), "must not be negative"),
    "probability": (
        bad(segments=row(exp_avg_rule=5)), "probability of 2 is not within 0 and 1"),
    "segments' dtype": (
        bad(segments=row().int()), r"segments must be .* int64 and shape \[n, 11\]"),
    "segments' width": (bad(segments=row()[:, :5]), r"shape \[n, 11\]"),
    "coefficients' dtype": (
        bad(coefficients=torch.zeros(1, 12)), "coefficients must be .* float64"),
    "rows": (
        bad(coefficients=torch.zeros(2, 12).double()), "segments has 1 rows, coefficients 2"),
    "statistics": (bad(statistics=3), r"statistics must be 0 \(none\), 1 \(after\) or 2"),
}  # fmt: skip


@pytest.mark.parametrize("run", [REFERENCE, active("cpu")], ids=lambda k: k.name)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_an_element_is_written(run: Kernel, name: str) -> None:
    arguments, message = BAD[name]
    before = [x.clone() for xs in arguments[:2] for x in xs]
    with pytest.raises(RuntimeError, match=message):
        run.transform(*arguments)
    for x, old in zip((x for xs in arguments[:2] for x in xs), before, strict=True):
        assert torch.equal(x, old)


@needs_gpu
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_on_the_gpu(name: str) -> None:
    (m, v, *rest), message = BAD[name]
    if name in ("not contiguous", "shared memory"):
        storage = torch.ones(16, device="cuda")
        m, v = ([storage[::2]], [torch.ones(8, device="cuda")]) if name == "not contiguous" else (
            [storage[:8]], [storage[4:12]])  # fmt: skip
    else:
        m, v = ([x.cuda() for x in xs] for xs in (m, v))
    with pytest.raises(RuntimeError, match=message):
        active("cuda").transform(m, v, *rest)
    assert all((x == 1).all() for x in [*m, *v])


@needs_gpu
def test_a_cpu_tensor_among_cuda_tensors_is_refused() -> None:
    m, v = [torch.ones(8, device="cuda")], [torch.ones(8)]
    with pytest.raises(RuntimeError, match=r"exp_avg_sq\[0\] is not on the CUDA"):
        active("cuda").transform(m, v, *bad()[2:])
    assert m[0].eq(1).all()


@pytest.mark.parametrize("run", [REFERENCE, active("cpu")], ids=lambda k: k.name)
@pytest.mark.parametrize(
    ("ranges", "level", "message"),
    [
        ([[1, 0, 8, 0]], 0, "range 0: there is no tensor 1, only 1"),
        ([[0, 0, 9, 0]], 0, "range 0: elements 0 to 9 are not within tensor 0 of 8 elements"),
        ([[0, 0, 8, 2]], 0, "range 0: there is no group 2, only 1"),
        ([[0, 0, 8, 0]], 3, "level must be 0, 1 or 2, not 3"),
        ([[0, 0, 8]], 0, r"ranges must be .* shape \[n, 4\]"),
    ],
)
def test_bad_input_of_the_histogram_is_refused(
    run: Kernel, ranges: list[list[int]], level: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        run.histogram(
            [torch.ones(8)], torch.tensor(ranges), torch.zeros(1, dtype=torch.int64), level
        )


def test_touching_and_empty_segments_are_no_overlap(kernel: Kernel) -> None:
    m, v = torch.ones(8, device=kernel.device), torch.ones(8, device=kernel.device)
    parts = [(4, 8), (0, 4), (4, 4), (2, 2)]
    kernel.run([m], [v], [Segment(0, a, b, Scale(2.0), Keep()) for a, b in parts])
    assert m.tolist() == [2.0] * 8


# The launch table.


def test_a_prepared_table_gives_the_same_result(kernel: Kernel) -> None:
    m, v = (x.to(kernel.device) for x in moments(100_000, torch.float32, torch.float32))
    once, twice = (m.clone(), v.clone()), (m.clone(), v.clone())
    segments = [Segment(0, 7, 99_000, Scale(0.5), Scale(0.25))]
    plain = Transform.of([once[0]], [once[1]], segments)(Statistics.AFTER)
    prepared = Transform.of([twice[0]], [twice[1]], segments).prepare()(Statistics.AFTER)
    assert torch.equal(plain.nan_to_num(), prepared.nan_to_num())
    assert all(same_bits(a, b) for a, b in zip(once, twice, strict=True))


def test_a_prepared_transform_can_be_applied_again_and_sees_new_values(kernel: Kernel) -> None:
    sizes = (70_001, 0, 12, 40_000)
    pairs = [moments(n, torch.float32, torch.bfloat16, n) for n in sizes]
    mine, theirs = ([[x.clone().to(d) for x in xs] for xs in zip(*pairs, strict=True)]
                    for d in (kernel.device, "cpu"))  # fmt: skip
    segments = [Segment(i, 0, n, Scale(0.5), Scale(0.25)) for i, n in enumerate(sizes)]
    prepared = Transform.of(*mine, segments).prepare()
    for statistics in (*Statistics, *Statistics):
        found = prepared(statistics)
        expected = REFERENCE.run(*theirs, segments, statistics)
        for a, b in zip(itertools.chain(*mine), itertools.chain(*theirs), strict=True):
            assert same_bits(a.cpu(), b)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=0, equal_nan=True)
        mine[0][2].fill_(float(statistics))
        theirs[0][2].fill_(float(statistics))


def test_a_prepared_transform_keeps_its_tensors(kernel: Kernel) -> None:
    m, v = torch.ones(8, device=kernel.device), torch.ones(8, device=kernel.device)
    kept = [weakref.ref(m), weakref.ref(v)]
    prepared = Transform.of([m], [v], [Segment(0, 0, 8, Scale(2.0), Keep())]).prepare()
    del m, v
    gc.collect()
    assert all(x() is not None for x in kept)
    assert prepared(Statistics.AFTER)[0, :, 2].tolist() == [2.0, 1.0]


def other_words(header: torch.Tensor, index: int, value: int) -> torch.Tensor:
    out = header.clone()
    out[index] = value
    return out


@pytest.mark.parametrize(
    "change",
    [
        lambda table, header: (table, header[:4]),
        lambda table, header: (table, header.int()),
        lambda table, header: (table, other_words(header, 0, 1)),
        lambda table, header: (table, other_words(header, 3, 2)),
        lambda table, header: (table, other_words(header, 4, 7)),
        lambda table, header: (table[:-1], header),
        lambda table, header: (table.view(torch.int8), header),
        lambda table, header: (table[:0], header),
    ],
)
def test_what_is_no_launch_table_is_refused(kernel: Kernel, change: Callable[..., tuple]) -> None:
    m, v = torch.ones(8, device=kernel.device), torch.ones(8, device=kernel.device)
    made = Transform.of([m], [v], [Segment(0, 0, 8, Scale(2.0), Keep())]).prepare().prepared
    table, header = change(*made)
    with pytest.raises(RuntimeError, match="not what launch_table returned"):
        torch.ops.megatron_ext.transform_prepared_(table, header, 0)
    assert m.eq(1.0).all()


def test_without_a_compiled_kernel_a_prepared_transform_is_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    m, v = torch.ones(8), torch.ones(8)
    transform = Transform.of([m], [v], [Segment(0, 0, 8, Scale(2.0), Keep())])
    monkeypatch.setattr(torch.ops, "megatron_ext", reference)
    out = transform.prepare()(Statistics.AFTER)
    assert m.eq(2.0).all()
    assert out[0, 0, 2] == 2.0
    tables = reference.launch_table([m], [v], transform.segments, transform.coefficients)
    assert [x.numel() for x in tables] == [0, 0]
    with pytest.raises(RuntimeError, match="there is no compiled kernel for cpu"):
        reference.transform_prepared_(*tables, 0)


def test_the_cases_cover_every_rule() -> None:
    used = {type(rule) for pair in RULES.values() for rule in pair}
    assert used == set(registry.element_rules().values())
    assert NO_CODE not in registry.element_rules()
