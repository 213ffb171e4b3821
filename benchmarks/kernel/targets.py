"""What was to be reached, compared with what was measured. Reads a result as it is written."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .operations import BATCH_SIZE, COMPARE, RESCALE, RESET
from .peers import COPY, FOREACH, MUL, OURS, SHORTCUT, ZERO
from .shapes import HUGE_TENSOR, SMALL_TENSORS

#: Elements from which a figure for one huge tensor counts.
GPU_ELEMENTS, CPU_ELEMENTS, CPU_THREADS = 10**9, 32 * 10**6, 2

_COUNTED = f"{RESCALE}, statistics before and after"


@dataclass(frozen=True)
class Verdict:
    """One target.

    Args:
        figure: What it is about.
        ours: Measured.
        peer: Measured.
        predicted: Ratio from the bytes.
        measured: Ratio.
        target: Least ratio, or what it has to be; ``none`` for a figure that is only shown.
        verdict: ``met``, ``missed``, or ``not run`` and why; ``-`` without a target.
    """

    figure: str
    ours: str
    peer: str
    predicted: str
    measured: str
    target: str
    verdict: str


def verdicts(result: dict[str, Any]) -> list[Verdict]:
    """Every target, in the report's order."""
    return [*_gpu(result), *_cpu(result)]


def median(row: dict[str, Any]) -> float:
    """Seconds of a call."""
    return statistics.median(row["seconds"])


def traffic(row: dict[str, Any]) -> int | None:
    """Bytes for a pair of elements."""
    return sum(n for _, n in row["traffic"]) if row["traffic"] else None


def find(result: dict[str, Any], operation: str, shape: str) -> dict[str, Any] | None:
    """The group of an operation on a shape."""
    for group in result["groups"]:
        if (group["operation"], group["shape"]) == (operation, shape):
            return group
    return None


def pick(group: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The row of an implementation, if it was measured."""
    rows = [row for row in group["rows"] if row["name"] == name and row["seconds"]]
    return rows[0] if rows else None


def _gpu(result: dict[str, Any]) -> Iterator[Verdict]:
    why = "" if result["device"] == "cuda" else "no CUDA device in this run"
    huge = (HUGE_TENSOR, GPU_ELEMENTS)
    what = "GPU, rescale m and v with statistics, 1e9 elements"
    yield _ratio(result, f"{what}: bandwidth against copy_", _COUNTED, huge, COPY, 0.92, why)
    yield _ratio(result, f"{what}: time against foreach", _COUNTED, huge, FOREACH, 2.0, why)
    yield _ratio(result, f"{what}: time against its shortcut", _COUNTED, huge, SHORTCUT, None, why)
    what = "GPU, batch-size rule, 1e9 elements"
    yield _ratio(result, f"{what}: time against foreach", BATCH_SIZE, huge, FOREACH, 3.0, why)
    yield _ratio(result, f"{what}: bandwidth against copy_", BATCH_SIZE, huge, COPY, 0.92, why)
    yield _temporaries(result, f"{what}: bytes of temporaries", BATCH_SIZE, huge, why)
    what = "GPU, compare weights, 1e9 elements"
    yield _ratio(result, f"{what}: bandwidth against copy_", COMPARE, huge, COPY, 0.92, why)
    yield from _dtypes(result, "GPU", COPY, (0.92, 0.92), GPU_ELEMENTS, why)
    for shape in result["shapes"]:
        if shape["single"] and shape["name"] != HUGE_TENSOR:
            continue  # those in another dtype are above
        least = 5.0 if shape["name"] == SMALL_TENSORS else 1.0
        whole = (shape["name"], shape["whole"])
        figure = f"GPU, rescale without statistics, {shape['name']}: time against foreach"
        yield _ratio(result, figure, RESCALE, whole, FOREACH, least, why)
    figure = "GPU, reset m and v, 1e9 elements: bandwidth against zero_"
    yield _ratio(result, figure, RESET, huge, ZERO, 0.92, why)


def _cpu(result: dict[str, Any]) -> Iterator[Verdict]:
    why = "" if result["device"] == "cpu" else "not the device of this run"
    threads = result["environment"]["threads"]
    if not why and threads != CPU_THREADS:
        why = f"{threads} threads, not {CPU_THREADS}"
    huge = (HUGE_TENSOR, CPU_ELEMENTS)
    what = "CPU, rescale m and v with statistics, 2 threads, one huge tensor"
    yield _ratio(result, f"{what}: time against foreach", _COUNTED, huge, FOREACH, 4.0, why)
    yield _ratio(result, f"{what}: time against its shortcut", _COUNTED, huge, SHORTCUT, None, why)
    yield _ratio(result, f"{what}: bandwidth against mul_", _COUNTED, huge, MUL, 0.8, why)
    yield from _dtypes(result, "CPU", MUL, (0.8, 0.5), CPU_ELEMENTS, why)
    small = (SMALL_TENSORS, 10_240_000)
    for operation in (RESCALE, RESET):
        figure = f"CPU, {operation}, 2 threads, 10,000 tensors of 1,024: time against foreach"
        yield _ratio(result, figure, operation, small, FOREACH, 3.0, why)


def _dtypes(
    result: dict[str, Any],
    device: str,
    limit: str,
    least: tuple[float, float],
    elements: int,
    why: str,
) -> Iterator[Verdict]:
    """16 bits, without statistics and with them."""
    name = limit.removeprefix("limit: ")
    for dtype in ("bfloat16", "float16"):
        shape = (f"{HUGE_TENSOR}, {dtype}", elements)
        for operation, at_least in zip((RESCALE, _COUNTED), least, strict=True):
            figure = f"{device}, {operation}, {dtype}: bandwidth against {name}"
            yield _ratio(result, figure, operation, shape, limit, at_least, why)


def _ratio(
    result: dict[str, Any],
    figure: str,
    operation: str,
    shape: tuple[str, int],
    name: str,
    least: float | None,
    why: str,
) -> Verdict:
    """A ratio of times; with a limit as the peer, that of the bandwidths.

    Without a least ratio it is shown beside one that has a target.
    """
    target = f">= {least:g}x" if least is not None else "none"
    group = find(result, operation, shape[0])
    ours = pick(group, OURS) if group else None
    peer = pick(group, name) if group else None
    if not why and (group is None or ours is None or peer is None):
        why = "not measured"
    if not why and group is not None and group["elements"] < shape[1]:
        why = f"{group['elements']:,} elements, not {shape[1]:,}"
    if why or group is None or ours is None or peer is None:
        return Verdict(figure, "-", "-", "-", "-", target, f"not run ({why})")
    measured = median(peer) / median(ours)
    predicted = (traffic(peer) or 0) / (traffic(ours) or 1)
    if peer["limit"]:
        measured, predicted = measured / predicted, 1.0
    return Verdict(
        figure,
        _speed(ours, group["elements"]),
        f"{name.removeprefix('limit: ')} {_speed(peer, group['elements'])}",
        f"{predicted:.2f}x",
        f"{measured:.2f}x",
        target,
        "-" if least is None else "met" if measured >= least else "missed",
    )


def _temporaries(
    result: dict[str, Any], figure: str, operation: str, shape: tuple[str, int], why: str
) -> Verdict:
    group = find(result, operation, shape[0])
    ours = pick(group, OURS) if group else None
    peer = pick(group, FOREACH) if group else None
    if not why and (group is None or ours is None):
        why = "not measured"
    if not why and group is not None and group["elements"] < shape[1]:
        why = f"{group['elements']:,} elements, not {shape[1]:,}"
    if why or ours is None:
        return Verdict(figure, "-", "-", "-", "-", "0", f"not run ({why})")
    used = ours["temporaries"]
    other = f"foreach {peer['temporaries']:,}" if peer else "-"
    met = "met" if used == 0 else "missed"
    return Verdict(figure, f"{used:,}", other, "-", "-", "0", met)


def _speed(row: dict[str, Any], elements: int) -> str:
    seconds = median(row)
    speed = (traffic(row) or 0) * elements / seconds / 1e9
    return f"{seconds * 1e3:.3f} ms, {speed:.1f} GB/s"
