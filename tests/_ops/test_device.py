"""What only a CUDA device shows: streams, graphs, launches, large tensors, races."""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import sys

import pytest
import torch

from megatron_ext._ops import Transform
from megatron_ext._ops.segments import Segment, Statistics
from megatron_ext.rules.elementwise import Fill, Keep, Scale
from tests.support.moments import DTYPES, REFERENCE, active, moments, rule_pairs, same_bits

RULES = rule_pairs()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def ones(n: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [torch.ones(n, device="cuda")], [torch.ones(n, device="cuda")]


# Streams, graphs, launches.


def test_a_stream_that_is_not_the_default_is_the_one_that_is_used() -> None:
    n = 1 << 22
    (m,), (v,) = ones(n)
    prepared = Transform.of([m], [v], [Segment(0, 0, n, Scale(2.0), Scale(4.0))]).prepare()
    half = Transform.of([m], [v], [Segment(0, 0, n, Keep(), Scale(0.5))])
    stream = torch.cuda.Stream()
    for _ in range(2):  # the first time makes room, which may wait for the device
        torch.cuda.synchronize()
        m.fill_(1.0)
        v.fill_(1.0)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000_000)
            m.fill_(3.0)
            found = prepared(Statistics.AFTER)
            listed = half(Statistics.AFTER)
        waits = not stream.query()
    # The calls came back before anything had run.
    assert waits
    stream.synchronize()
    assert m.eq(6.0).all()
    assert v.eq(2.0).all()
    assert found[0, :, 2].tolist() == [6.0, 4.0]
    assert listed[0, :, 2].tolist() == [6.0, 2.0]


def captured(prepared: Transform) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    prepared(Statistics.AFTER)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = prepared(Statistics.AFTER)
    return graph, out


def test_a_cuda_graph_captures_a_prepared_transform() -> None:
    m, v = ones(100_000)
    prepared = Transform.of(m, v, [Segment(0, 0, 100_000, Scale(2.0), Scale(4.0))]).prepare()
    graph, out = captured(prepared)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert m[0].eq(16.0).all()
    assert v[0].eq(256.0).all()
    assert out[0, 0, 2] == 16.0


def test_a_capture_refuses_what_is_not_prepared() -> None:
    transform = Transform.of(*ones(8), [Segment(0, 0, 8, Scale(2.0), Keep())])
    for call in (transform, transform.prepare):
        with (
            pytest.raises(RuntimeError, match="prepare the transform before the capture"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            call()
    assert transform.exp_avg[0].eq(1.0).all()


OUTLIVED = """
import torch
from tests._ops.test_device import captured, ones
from megatron_ext._ops import Transform
from megatron_ext._ops.segments import Segment
from megatron_ext.rules.elementwise import Keep, Scale
m, v = ones(8)
graph, out = captured(Transform.of(m, v, [Segment(0, 0, 8, Scale(2.0), Keep())]).prepare())
torch.cuda.synchronize()
print("captured", flush=True)
graph.replay()
torch.cuda.synchronize()
"""


def test_a_graph_that_outlives_its_transform_stops_with_an_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUTLIVED], capture_output=True, text=True, timeout=300
    )
    assert done.returncode != 0
    assert "captured" in done.stdout
    assert "a CUDA graph outlived the prepared Transform that it launches" in done.stderr
    assert "device-side assert" in done.stderr


@pytest.mark.parametrize("statistics", list(Statistics))
def test_a_prepared_transform_is_one_kernel_and_no_copy(statistics: Statistics) -> None:
    n = 1 << 20
    prepared = Transform.of(*ones(n), [Segment(0, 0, n, Scale(2.0), Keep())]).prepare()
    prepared(statistics)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        prepared(statistics)
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert ["transform_kernel" in e.name for e in kernels] == [True]


def test_a_prepared_transform_allocates_its_result_only() -> None:
    n = 1 << 20
    prepared = Transform.of(*ones(n), [Segment(0, 0, n, Scale(2.0), Keep())]).prepare()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    prepared()
    assert torch.cuda.max_memory_allocated() == before
    out = prepared(Statistics.AFTER)
    assert torch.cuda.max_memory_allocated() - before == -(-out.nbytes // 512) * 512


# Numbers.


def test_a_tensor_of_more_than_2_to_the_31_elements() -> None:
    n = (1 << 31) + 70_001
    # Two of 16 bits each, whose ends can be told from their middle.
    m = torch.full((n,), 1.0, dtype=torch.bfloat16, device="cuda")
    v = torch.full((n,), 2.0, dtype=torch.float16, device="cuda")
    begin = (1 << 31) - 5
    m[begin - 1], m[-1] = 16.0, 32.0
    segments = [
        Segment(0, 0, begin, Keep(), Fill(4.0)),
        Segment(0, begin, n, Scale(2.0), Scale(0.5)),
    ]
    (found,) = Transform.of([m], [v], segments)(Statistics.BEFORE_AND_AFTER)
    expected = [
        [n - 2 + 256 + 1024, begin - 1 + 256 + 4 * (n - begin - 1) + 4096, 64.0, 0, n - begin],
        [4.0 * n, 16.0 * begin + 1.0 * (n - begin), 4.0, 0, n],
    ]
    assert found.tolist() == expected
    assert m[begin - 3 : begin + 3].tolist() == [1.0, 1.0, 16.0, 2.0, 2.0, 2.0]
    assert v[begin - 1 : begin + 1].tolist() == [4.0, 1.0]
    assert m[-1] == 64.0


def test_many_repetitions_on_several_streams_give_the_same_bits() -> None:
    """Blocks end in another order each time, which no bit of the statistics may show."""
    sizes = (3_000_001, 70_001, 12, 1_000_000)
    pairs = [moments(n, torch.float32, torch.bfloat16, n) for n in sizes]
    m, v = ([x.nan_to_num(0.5, 1.0, 1.0).cuda() for x in xs] for xs in zip(*pairs, strict=True))
    keep = Transform.keep(m, v).prepare()
    busy = torch.cuda.Stream()
    other = torch.ones(1 << 24, device="cuda")
    results = set()
    for i in range(200):
        with torch.cuda.stream(busy):
            other[: (i % 7 + 1) << 21].mul_(1.0)
        results.add(keep(Statistics.AFTER).cpu().numpy().tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("name", RULES)
def test_odd_views_of_one_allocation(name: str) -> None:
    """As shards lie in a buffer: at any element, with foreign elements on both sides."""
    for dtype_m, dtype_v in zip(DTYPES, DTYPES[1:] + DTYPES[:1], strict=True):
        parts = [(1, 40_000), (40_003, 40_010), (40_011, 75_000)]
        m, v = moments(75_003, dtype_m, dtype_v)
        mine, theirs = ([x.clone().to(d) for x in (m, v)] for d in ("cuda", "cpu"))
        segments = [Segment(i, 1, b - a, *RULES[name]) for i, (a, b) in enumerate(parts)]
        for kernel, whole in ((active("cuda"), mine), (REFERENCE, theirs)):
            views = [[x[a:b] for a, b in parts] for x in whole]
            kernel.run(*views, segments)
        for a, b in zip(mine, theirs, strict=True):
            assert same_bits(a.cpu(), b)


# The tools.


@pytest.mark.skipif(
    shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer on the PATH"
)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable]
    done = subprocess.run(
        [*command, "-m", "tests.support.small_case"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)", done.stdout)
