"""The ops in plain torch, which are the default kernels and the reference of the compiled ones.

The arithmetic of a rule is its `megatron_ext.rules.base.ElementRule.reference`. It is fp32, and
every operation is rounded separately, so that the kernels of ``csrc/`` give the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..rules import registry
from ..rules.registry import COEFFICIENTS
from .segments import COLUMNS, STATISTICS_COLUMNS, Statistics

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENTS = ("exp_avg", "exp_avg_sq")

_ELEMENTS_AT_A_TIME = 1 << 22
#: For each level of the histogram, the number of bits of abs(x) in fp32 that it sorts by, and the
#: number of bits below them.
LEVELS = ((11, 20), (10, 10), (10, 0))
BINS = 2048


def transform_moments_(
    exp_avg: Sequence[torch.Tensor],
    exp_avg_sq: Sequence[torch.Tensor],
    segments: torch.Tensor,
    coefficients: torch.Tensor,
    statistics: int,
) -> torch.Tensor:
    """Apply the segment table in place; see `.schema`."""
    if statistics not in tuple(Statistics):
        raise RuntimeError(
            f"statistics must be 0 (none), 1 (after) or 2 (before and after), not {statistics}"
        )
    _check_lists(exp_avg, exp_avg_sq)
    rows = _check_table(exp_avg, segments, coefficients)
    like = exp_avg[0] if exp_avg else segments
    count = len(exp_avg) if statistics else 0
    out = like.new_zeros((count, 2, len(STATISTICS_COLUMNS)), dtype=torch.float64)
    for row, values, exact in zip(
        rows, coefficients.float().tolist(), coefficients.tolist(), strict=True
    ):
        tensor, begin, end = row["tensor"], row["begin"], row["end"]
        m = exp_avg[tensor].view(-1)[begin:end]
        v = exp_avg_sq[tensor].view(-1)[begin:end]
        old = tuple(x.to(torch.float32, copy=True) for x in (m, v))
        for moment, (stored, before) in enumerate(zip((m, v), old, strict=True)):
            mine = slice(moment * COEFFICIENTS, (moment + 1) * COEFFICIENTS)
            segment = SegmentOperands(row, MOMENTS[moment], old[0], values[mine], exact[mine])
            after = segment.apply(before)
            if after is not before:
                stored.copy_(after)
            if statistics:
                _count(out[tensor, moment], before, stored.float(), MOMENTS[moment])
    if statistics == Statistics.AFTER:
        out[..., [0, 4]] = -1.0
    return out


def launch_table(
    exp_avg: Sequence[torch.Tensor],
    exp_avg_sq: Sequence[torch.Tensor],
    segments: torch.Tensor,
    coefficients: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the segment table and return empty tables, because plain torch needs none."""
    _check_lists(exp_avg, exp_avg_sq)
    _check_table(exp_avg, segments, coefficients)
    device = exp_avg[0].device if exp_avg else segments.device
    return torch.empty(0, dtype=torch.uint8, device=device), torch.empty(0, dtype=torch.int64)


def transform_prepared_(table: torch.Tensor, header: torch.Tensor, statistics: int) -> torch.Tensor:
    """Refuse: a table has addresses, which plain torch cannot use."""
    raise RuntimeError(
        f"there is no compiled kernel for {table.device.type}, and the reference needs the tensors"
    )


def compare_weights(
    master: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Compare master weights with the weights that they round to; see `.schema`."""
    if len(master) != len(weights):
        raise RuntimeError(f"master has {len(master)} tensors, weights {len(weights)}")
    for i, (a, b) in enumerate(zip(master, weights, strict=True)):
        _check_tensor(a, "master", i, master[0].device)
        _check_tensor(b, "weights", i, master[0].device)
        if a.numel() != b.numel():
            raise RuntimeError(f"master[{i}] has {a.numel()} elements, weights[{i}] {b.numel()}")
    device = master[0].device if master else torch.device("cpu")
    out = torch.zeros(len(master), 2, dtype=torch.int64, device=device)
    for row, a, b in zip(out, master, weights, strict=True):
        # In parts, because a copy of a parameter may not fit into memory.
        parts = (x.view(-1).split(_ELEMENTS_AT_A_TIME) for x in (a, b))
        for mine, weight in zip(*parts, strict=True):
            _compare(row, mine.to(weight.dtype).float(), weight.float())
    return out


def magnitude_histogram(
    tensors: Sequence[torch.Tensor], ranges: torch.Tensor, prefixes: torch.Tensor, level: int
) -> torch.Tensor:
    """Count one level of the radix select; see `.schema`."""
    if not 0 <= level < len(LEVELS):
        raise RuntimeError(f"level must be 0, 1 or 2, not {level}")
    for i, x in enumerate(tensors):
        _check_tensor(x, "tensors", i, tensors[0].device)
    _check_shape(ranges, "ranges", torch.int64, 4)
    groups = len(prefixes)
    if prefixes.dtype != torch.int64 or prefixes.dim() != 1:
        raise RuntimeError("prefixes must be a contiguous int64 tensor of one dimension")
    bits, shift = LEVELS[level]
    rows = ranges.tolist()
    for i, (tensor, begin, end, group) in enumerate(rows):
        _check_range(f"range {i}", tensor, begin, end, tensors)
        if not 0 <= group < groups:
            raise RuntimeError(f"range {i}: there is no group {group}, only {groups}")
    out = prefixes.new_zeros((groups, BINS))
    for tensor, begin, end, group in rows:
        x = tensors[tensor].view(-1)[begin:end].float()
        key = x.view(torch.int32) & 0x7FFFFFFF
        wanted = key[(key >> (shift + bits)) == prefixes[group]]
        out[group] += torch.bincount((wanted >> shift) & ((1 << bits) - 1), minlength=BINS)
    return out


@dataclass(frozen=True)
class SegmentOperands:
    """The operands (`megatron_ext.rules.base.Operands`) of one moment of a segment.

    Args:
        row: The segment's row of the table, by column.
        moment: ``exp_avg`` or ``exp_avg_sq``.
        exp_avg: The old exp_avg of the segment, fp32.
        coefficients: The coefficients of the moment's rule, rounded to fp32.
        exact: The coefficients in float64.
    """

    row: dict[str, int]
    moment: str
    exp_avg: torch.Tensor
    coefficients: list[float]
    exact: list[float]

    @property
    def stream_key(self) -> int:
        """The key of the random stream."""
        return self.row[f"{self.moment}_key"]

    def index(self) -> torch.Tensor:
        """Compute the elements' indices in the unsharded parameter, int64."""
        row, x = self.row, self.exp_avg
        i = row["start"] + torch.arange(len(x), dtype=torch.int64, device=x.device)
        if row["row_length"] == 0:
            return row["base"] + i
        return row["base"] + i // row["row_length"] * row["row_stride"] + i % row["row_length"]

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the new values; returns `x` itself if they are kept."""
        rule = registry.element_rules()[self.row[f"{self.moment}_rule"]]
        return rule.reference(x, self)


def _count(out: torch.Tensor, before: torch.Tensor, after: torch.Tensor, moment: str) -> None:
    out[0] += before.double().square().sum()
    out[1] += after.double().square().sum()
    magnitude = after.abs()
    largest = torch.where(magnitude.isnan(), 0.0, magnitude)
    if len(largest):
        out[2] = torch.maximum(out[2], largest.max().double())
    unusable = ~after.isfinite()
    if moment == "exp_avg_sq":
        unusable |= after < 0.0
    out[3] += unusable.sum()
    out[4] += ((before != after) & ~(before.isnan() & after.isnan())).sum()


def _compare(row: torch.Tensor, rounded: torch.Tensor, weight: torch.Tensor) -> None:
    differs = rounded.view(torch.int32) != weight.view(torch.int32)
    differs &= ~(rounded.isnan() & weight.isnan())
    row[0] += differs.sum()
    distance = (rounded - weight).abs()
    distance = torch.where(distance.isnan(), 0.0, distance)
    if len(distance):
        row[1] = torch.maximum(row[1], distance.max().view(torch.int32).long())


def _check_tensor(x: torch.Tensor, name: str, index: int, device: torch.device) -> None:
    if x.device.type != device.type:
        raise RuntimeError(f"{name}[{index}] is not on the {device.type.upper()} as the others are")
    if x.device != device:
        raise RuntimeError(
            f"{name}[{index}] is on device {x.device.index}, the first tensor on {device.index}"
        )
    if not x.is_contiguous():
        raise RuntimeError(f"{name}[{index}] is not contiguous")
    if x.dtype not in DTYPES:
        raise RuntimeError(f"{name}[{index}] is neither float32, bfloat16 nor float16")


def _check_lists(exp_avg: Sequence[torch.Tensor], exp_avg_sq: Sequence[torch.Tensor]) -> None:
    if len(exp_avg) != len(exp_avg_sq):
        raise RuntimeError(f"exp_avg has {len(exp_avg)} tensors, exp_avg_sq {len(exp_avg_sq)}")
    memory = []
    for i, (m, v) in enumerate(zip(exp_avg, exp_avg_sq, strict=True)):
        for name, x in (("exp_avg", m), ("exp_avg_sq", v)):
            _check_tensor(x, name, i, exp_avg[0].device)
            if x.numel():
                begin = x.data_ptr()
                memory.append((begin, begin + x.numel() * x.element_size(), f"{name}[{i}]"))
        if m.numel() != v.numel():
            raise RuntimeError(
                f"exp_avg[{i}] has {m.numel()} elements, exp_avg_sq[{i}] {v.numel()}"
            )
    memory.sort()
    for (_, end, first), (begin, _, second) in itertools.pairwise(memory):
        if begin < end:
            raise RuntimeError(f"{first} and {second} share memory")


def _check_shape(x: torch.Tensor, name: str, dtype: torch.dtype, width: int) -> None:
    ok = x.device.type == "cpu" and x.dtype == dtype and x.dim() == 2 and x.shape[1] == width
    if not ok or not x.is_contiguous():
        raise RuntimeError(
            f"{name} must be a contiguous CPU tensor of dtype {str(dtype).removeprefix('torch.')} "
            f"and shape [n, {width}]"
        )


def _check_range(
    what: str, tensor: int, begin: int, end: int, tensors: Sequence[torch.Tensor]
) -> None:
    if not 0 <= tensor < len(tensors):
        raise RuntimeError(f"{what}: there is no tensor {tensor}, only {len(tensors)}")
    numel = tensors[tensor].numel()
    if not 0 <= begin <= end <= numel:
        raise RuntimeError(
            f"{what}: elements {begin} to {end} are not within tensor {tensor} of {numel} elements"
        )


def _check_table(
    exp_avg: Sequence[torch.Tensor], segments: torch.Tensor, coefficients: torch.Tensor
) -> list[dict[str, int]]:
    """Check the segment table; returns its rows by column, with their number as ``row``."""
    _check_shape(segments, "segments", torch.int64, len(COLUMNS))
    _check_shape(coefficients, "coefficients", torch.float64, 2 * COEFFICIENTS)
    if len(segments) != len(coefficients):
        raise RuntimeError(f"segments has {len(segments)} rows, coefficients {len(coefficients)}")
    rows = [
        {"row": i, **dict(zip(COLUMNS, values, strict=True))}
        for i, values in enumerate(segments.tolist())
    ]
    for row in rows:
        _check_row(row, exp_avg, coefficients)
    last = {"tensor": -1, "begin": 0, "end": 0}
    for row in sorted(rows, key=lambda r: (r["tensor"], r["begin"])):
        if row["begin"] == row["end"]:
            continue
        if row["tensor"] == last["tensor"] and row["begin"] < last["end"]:
            raise RuntimeError(
                f"segments overlap in tensor {row['tensor']}: {last['begin']} to {last['end']} and "
                f"{row['begin']} to {row['end']}"
            )
        last = row
    return rows


def _check_row(
    row: dict[str, int], exp_avg: Sequence[torch.Tensor], coefficients: torch.Tensor
) -> None:
    what = f"segment {row['row']}"
    _check_range(what, row["tensor"], row["begin"], row["end"], exp_avg)
    if any(row[column] < 0 for column in ("start", "base", "row_length", "row_stride")):
        raise RuntimeError(f"{what}: start, base, row_length and row_stride must not be negative")
    rules = []
    for i, moment in enumerate(MOMENTS):
        code = row[f"{moment}_rule"]
        rule = registry.element_rules().get(code)
        if rule is None:
            raise RuntimeError(f"{what}: {code} is no rule for {moment}")
        exact = coefficients[row["row"], i * COEFFICIENTS : (i + 1) * COEFFICIENTS].tolist()
        if refusal := rule.coefficient_refusal(exact):
            raise RuntimeError(f"{rule.name}: {refusal}")
        rules.append(rule)
    m, v = rules
    if m.kind == "joint":
        raise RuntimeError(f"{what}: {m.name} is a rule for exp_avg_sq, not for exp_avg")
    if v.kind == "joint" and m.kind != "kept":
        raise RuntimeError(f"{what}: {v.name} reads exp_avg, which must be kept beside it")
