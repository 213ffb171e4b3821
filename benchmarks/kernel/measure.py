"""Checking that the implementations agree, and timing them in turns."""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import torch

from megatron_ext._ops import reference
from megatron_ext._ops.segments import Statistics, encode

from .operations import CHECKED, COMPARE, QUANTILE, THRESHOLDS, TURNS, Operation, State, segments
from .peers import Peer, Step, columns, weights_of

#: For the comparison of results: sizes that are no multiple of anything.
_CHECKED_SIZES = (1000, 4097, 40_001)
_MOST_CALLS = 50


@dataclass
class Row:
    """What one implementation took.

    Args:
        name: Of the implementation.
        limit: Whether it is a limit of the device.
        traffic: Bytes for a pair of elements, by name; None where they do not matter.
        note: What it leaves out.
        reason: Why it was not measured; empty if it was.
        calls: Calls in a round.
        seconds: Of one call, on the device, for each round.
        host_seconds: Of one call, until it returned; CUDA only.
        temporaries: Bytes that one call needs at its peak above what it began with, its result
            included; CUDA only.
    """

    name: str
    limit: bool
    traffic: list[tuple[str, int]] | None
    note: str
    reason: str = ""
    calls: int = 0
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    temporaries: int | None = None


def measure(
    operation: Operation,
    state: State,
    candidates: Sequence[Peer],
    rounds: int,
    round_seconds: float,
) -> list[Row]:
    """Time all of them in turns: every round calls each of them, one after the other.

    Args:
        operation: What they do.
        state: Written by all of them.
        candidates: The implementations.
        rounds: How many.
        round_seconds: About how long each is called in a round, at least once.
    """
    cuda = state.exp_avg[0].is_cuda
    rows = [Row(p.name, p.limit, _traffic(p, state), p.note) for p in candidates]
    runs: list[tuple[Row, Step, count[int]]] = []
    for peer, row in zip(candidates, rows, strict=True):
        try:
            if not peer.limit:
                check(operation, peer, state.exp_avg[0])
            step, calls = peer.build(state, operation, TURNS), count()
            _warm(row, step, calls, cuda, round_seconds)
        except Exception as e:
            row.reason = reason(e)
            continue
        runs.append((row, step, calls))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for row, step, calls in runs:
                if row.calls > 1:
                    step(next(calls))
                seconds, host = _time(step, calls, row.calls, cuda)
                row.seconds.append(seconds)
                if cuda:
                    row.host_seconds.append(host)
    finally:
        gc.enable()
    return rows


def _traffic(peer: Peer, state: State) -> list[tuple[str, int]] | None:
    if peer.traffic is None:
        return None
    size = state.exp_avg[0].element_size()
    return [(name, n * size // 4) for name, n in peer.traffic]


def check(operation: Operation, peer: Peer, like: torch.Tensor) -> None:
    """Run an implementation on small tensors and compare with the reference kernel.

    Where it counts values that are not finite, once more with some that are not.

    Raises:
        AssertionError: They differ.
    """
    sizes = _CHECKED_SIZES[-1:] if operation.kind == THRESHOLDS else _CHECKED_SIZES
    dtype = str(like.dtype).removeprefix("torch.")
    state = State.make(sizes, str(like.device), seed=7, dtype=dtype, scratch=False)
    if operation.kind == THRESHOLDS:
        magnitudes = state.exp_avg[0].abs().sort().values
        threshold = magnitudes[math.floor(QUANTILE * (len(magnitudes) - 1))].item()
        result = peer.build(state, operation, CHECKED)(0).item()
        assert result == threshold, f"{result} is not {threshold}"
        return
    if operation.kind == COMPARE:
        found = peer.build(state, operation, CHECKED)(0)
        weights = weights_of(state.exp_avg, CHECKED)
        expected = reference.compare_weights(state.exp_avg, weights)[:, 0]
        assert torch.equal(found, expected), f"{found.tolist()} is not {expected.tolist()}"
        return
    other = state.clone()
    old = state.clone()
    statistics = _expected(state, operation)
    found = columns(peer.build(other, operation, CHECKED)(0), len(sizes))
    for x, y in zip(state.both, other.both, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-12)
    if found and operation.statistics == Statistics.BEFORE_AND_AFTER:
        # Where the rule keeps a value but for rounding, each changes others.
        statistics["changed"] = _changed(old, other)
    for name, values in found.items():
        if name.startswith("norm_"):
            name, values = name.replace("norm", "square_sum"), values.square()
        wanted = statistics[name].cpu()
        close = torch.allclose(values.cpu(), wanted, rtol=1e-4, atol=0.0)
        assert close, f"{name}: {values.tolist()} is not {wanted.tolist()}"
    if "nonfinite" in found:
        for moments in (state.exp_avg, state.exp_avg_sq):
            moments[0][3], moments[2][-2:] = math.nan, math.inf
        other = state.clone()
        wanted = _expected(state, operation)["nonfinite"]
        counts = columns(peer.build(other, operation, CHECKED)(0), len(sizes))["nonfinite"]
        torch.testing.assert_close(counts.cpu(), wanted.cpu())


def _changed(old: State, new: State) -> torch.Tensor:
    counts = [(x != y).sum().double() for x, y in zip(old.both, new.both, strict=True)]
    return torch.stack(counts).reshape(2, -1).T


def _expected(state: State, operation: Operation) -> dict[str, torch.Tensor]:
    assert operation.rules is not None
    sizes = [len(x) for x in state.exp_avg]
    table = encode(segments(sizes, operation.rules(CHECKED[0])))
    out = reference.transform_moments_(
        state.exp_avg, state.exp_avg_sq, *table, int(operation.statistics)
    )
    return columns(out, len(sizes)) if operation.statistics != Statistics.NONE else {}


def reason(e: Exception) -> str:
    """One line, without directories."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    return without_paths(f"{type(e).__name__}: {' '.join(lines)}"[:200])


def without_paths(text: str) -> str:
    """A text with absolute paths cut down to their last part."""
    return re.sub(r"(?<![\w.])(?:/[\w.+@-]+)+/([\w.+@-]+)", r"\1", text)


def _warm(row: Row, step: Step, calls: count[int], cuda: bool, round_seconds: float) -> None:
    step(next(calls))
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(next(calls))
        row.temporaries = torch.cuda.max_memory_allocated() - before
        torch.cuda.synchronize()
    seconds, _ = _time(step, calls, 1, cuda)
    row.calls = max(1, min(_MOST_CALLS, math.ceil(round_seconds / max(seconds, 1e-9))))


def _time(step: Step, numbers: count[int], calls: int, cuda: bool) -> tuple[float, float]:
    """Seconds of a call on the device, and until it returned."""
    if not cuda:
        begin = time.perf_counter()
        for _ in range(calls):
            step(next(numbers))
        seconds = (time.perf_counter() - begin) / calls
        return seconds, seconds
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    begin = time.perf_counter()
    for _ in range(calls):
        step(next(numbers))
    host = (time.perf_counter() - begin) / calls
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls, host
