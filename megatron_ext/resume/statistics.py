"""Compute statistics of the moments of unsharded parameters, over all ranks.

Means are exact integer sums, and quantiles are selected elements, so that the result has the same
bits on every layout. A parameter that several ranks hold in full counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import chain

import torch

from .. import _ops
from .._ops.quantiles import Part
from ..base.placement import Run, within
from ..plan.mean_of import Parts
from ..rules.base import Statistic
from .parameters import Shard

#: Number of fp32 exponents that share one int64 sum. A value stays below 2^31, so that the sum
#: holds 2^32 of them.
_WINDOW = 8
_WINDOWS = 256 // _WINDOW
#: An fp32 number is mantissa * 2^(exponent - 150), with its 24-bit mantissa as an integer.
_EXPONENT_BIAS = 150
_ELEMENTS_AT_A_TIME = 1 << 22
#: Number of quantiles computed in one call. Each has a histogram of 16 KiB.
_QUANTILES_AT_A_TIME = 2048

Value = float | torch.Tensor
Reduce = Callable[[torch.Tensor], object]


def compute_statistics(
    wanted: Sequence[Statistic],
    shards: Sequence[Shard],
    moment: Callable[[Shard, str], torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    reduce: Reduce,
    device: torch.device,
    sources: Mapping[Statistic, Parts] | None = None,
) -> dict[Statistic, Value]:
    """Compute statistics; collective.

    All means take one reduction, and each 2,048 medians and quantiles take three.

    Args:
        wanted: The statistics, the same on every rank in the same order.
        shards: This rank's shards.
        moment: Returns one moment of a shard, flattened: fp32, bf16 or fp16.
        shapes: Unsharded shape of each parameter in `wanted`.
        reduce: Sums an int64 tensor over all ranks, in place.
        device: The device of the moments.
        sources: For each ``mean-of`` in `wanted` the means of its parameters, in the same order on
            every rank.

    Returns:
        A number for each statistic; for ``column-mean`` float64 ``[columns]`` on the CPU.
    """
    by_name: dict[str, list[Shard]] = {}
    for shard in shards:
        by_name.setdefault(shard.parameter.name, []).append(shard)
    out: dict[Statistic, Value] = {}
    sources = sources or {}
    of_several = [s for s in wanted if s.kind == "mean-of"]
    parts = chain.from_iterable(sources[s] for s in of_several)
    means = list(dict.fromkeys([*(s for s in wanted if s.kind in ("mean", "column-mean")), *parts]))
    if means:
        exact = _means(means, by_name, moment, shapes, reduce, device)
        for one, by_column in exact.items():
            found = [float(x or 0) * one.factor for x in by_column]
            of_columns = one.kind == "column-mean"
            out[one] = torch.tensor(found, dtype=torch.float64) if of_columns else found[0]
        out.update({s: _mean_of(sources[s], exact) for s in of_several})
    selected = [s for s in wanted if s.kind in ("median", "quantile")]
    for at in range(0, len(selected), _QUANTILES_AT_A_TIME):
        some = selected[at : at + _QUANTILES_AT_A_TIME]
        out.update(_quantiles(some, by_name, moment, shapes, reduce, device))
    return out


def runs_of_rows(shard: Shard, rows: Sequence[tuple[int, int]]) -> Iterator[Run]:
    """Yield the elements of a shard that lie in some rows of the unsharded parameter.

    Args:
        shard: The shard.
        rows: First row and one past the last of each range.
    """
    width = shard.parameter.row_elements
    for run in shard.runs():
        for first, last in rows:
            if (piece := within(run, first * width, last * width)) is not None:
                yield piece


def columns(run: Run, begin: int, end: int, width: int, device: torch.device) -> torch.Tensor:
    """Compute the index of a run's elements into the dimensions after the first.

    Args:
        run: A run of a shard.
        begin: First element, counted from the start of the run.
        end: One past the last element.
        width: Number of elements of a row of the unsharded parameter.
        device: The device of the result.

    Returns:
        int64 ``[end - begin]``.
    """
    index = run.index
    at = torch.arange(index.start + begin, index.start + end, dtype=torch.int64, device=device)
    if index.row_length:
        row = torch.div(at, index.row_length, rounding_mode="floor")
        at = row * index.row_stride + (at - row * index.row_length)
    return (at + index.base) % width


def _means(
    wanted: Sequence[Statistic],
    by_name: Mapping[str, Sequence[Shard]],
    moment: Callable[[Shard, str], torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    reduce: Reduce,
    device: torch.device,
) -> dict[Statistic, list[Fraction | None]]:
    """Compute exact means, one for each column; None if no element of it is finite."""
    width = [_width(s, shapes) for s in wanted]
    # Each row has the sums of all windows, then the number of elements, of one column.
    sums = torch.zeros(sum(width), _WINDOWS + 1, dtype=torch.int64, device=device)
    at = 0
    for statistic, n in zip(wanted, width, strict=True):
        target = sums[at : at + n].view(-1)
        for shard in by_name.get(statistic.parameter, ()):
            values = moment(shard, statistic.key)
            for run in runs_of_rows(shard, statistic.rows):
                _add(target, values, run, n)
        at += n
    reduce(sums)
    out: dict[Statistic, list[Fraction | None]] = {}
    at = 0
    for statistic, n in zip(wanted, width, strict=True):
        out[statistic] = [_mean(row) for row in sums[at : at + n].tolist()]
        at += n
    return out


def _mean_of(parts: Parts, exact: Mapping[Statistic, Sequence[Fraction | None]]) -> float:
    """Weight the means of parameters by their numbers of elements.

    The sums count a parameter as often as the ranks hold it, so they cannot be added up.
    """
    total, count = Fraction(0), 0
    for part, elements in parts.items():
        (mean,) = exact[part]
        if mean is not None:
            total += mean * Fraction(part.factor) * elements
            count += elements
    return float(total / count) if count else 0.0


def _width(statistic: Statistic, shapes: Mapping[str, tuple[int, ...]]) -> int:
    if statistic.kind != "column-mean":
        return 1
    width = 1
    for n in shapes[statistic.parameter][1:]:
        width *= n
    return width


def _add(target: torch.Tensor, values: torch.Tensor, run: Run, width: int) -> None:
    """Add a run's values to the flattened ``[columns, windows + 1]`` sums, exactly."""
    length = run.end - run.begin
    for begin in range(0, length, _ELEMENTS_AT_A_TIME):
        end = min(begin + _ELEMENTS_AT_A_TIME, length)
        bits = values[run.begin + begin : run.begin + end].float().view(torch.int32).long()
        exponent = (bits >> 23) & 255
        mantissa = bits & 0x7FFFFF
        mantissa = torch.where(exponent > 0, mantissa | 0x800000, mantissa)
        exponent = exponent.clamp(min=1)
        value = mantissa << (exponent % _WINDOW)
        value = torch.where(bits < 0, -value, value)
        finite = exponent < 255
        column = columns(run, begin, end, width, values.device) * (_WINDOWS + 1)
        target.index_add_(0, column + exponent // _WINDOW, torch.where(finite, value, 0))
        target.index_add_(0, column + _WINDOWS, finite.long())


def _mean(row: Sequence[int]) -> Fraction | None:
    *windows, count = row
    if not count:
        return None
    total = sum(value << (_WINDOW * w) for w, value in enumerate(windows))
    return Fraction(total, count << _EXPONENT_BIAS)


def _quantiles(
    wanted: Sequence[Statistic],
    by_name: Mapping[str, Sequence[Shard]],
    moment: Callable[[Shard, str], torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    reduce: Reduce,
    device: torch.device,
) -> dict[Statistic, Value]:
    def parts() -> Iterator[Part]:
        for group, statistic in enumerate(wanted):
            for shard in by_name.get(statistic.parameter, ()):
                found = [(r.begin, r.end, group) for r in runs_of_rows(shard, statistic.rows)]
                if found:
                    yield moment(shard, statistic.key), found

    elements = torch.tensor([_elements(s, shapes) for s in wanted], dtype=torch.int64)
    copies: list[torch.Tensor] = []

    def reduce_once(counts: torch.Tensor) -> None:
        reduce(counts)
        if not copies:  # the first histogram counts every element
            copies.append((counts.sum(1) // elements.to(counts.device)).clamp(min=1)[:, None])
        counts //= copies[0]

    p = [0.5 if s.kind == "median" else s.fraction for s in wanted]
    values = _ops.magnitude_thresholds_of(
        parts, torch.tensor(p, dtype=torch.float64), device, reduce_once
    )
    return {s: v * s.factor for s, v in zip(wanted, values.tolist(), strict=True)}


def _elements(statistic: Statistic, shapes: Mapping[str, tuple[int, ...]]) -> int:
    width = 1
    for n in shapes[statistic.parameter][1:]:
        width *= n
    return max(1, width * sum(last - first for first, last in statistic.rows))
