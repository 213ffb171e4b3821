"""The ops in plain torch: default kernels, fallback, and what the others are tested against.

Each rule is written down here once. Arithmetic is fp32, every operation rounded by itself, so that
the kernels of ``csrc/`` can be compared bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from .segments import COEFFICIENTS, COLUMNS, STATISTICS_COLUMNS, Code, Statistics

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOMENTS = ("exp_avg", "exp_avg_sq")

#: Bits of abs(x) as fp32 that each level of the histogram sorts by, and those below.
LEVELS = ((11, 20), (10, 10), (10, 0))
BINS = 2048

# The constants of splitmix64 as signed 64-bit numbers, as torch's int64 wants them.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def transform_moments_(
    exp_avg: Sequence[torch.Tensor],
    exp_avg_sq: Sequence[torch.Tensor],
    segments: torch.Tensor,
    coefficients: torch.Tensor,
    statistics: int,
    device_table: torch.Tensor | None = None,
    host_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply the table in place; see `.schema`."""
    if statistics not in tuple(Statistics):
        raise RuntimeError(
            f"statistics must be 0 (none), 1 (after) or 2 (before and after), not {statistics}"
        )
    _check_lists(exp_avg, exp_avg_sq)
    rows = _check_table(exp_avg, segments, coefficients)
    like = exp_avg[0] if exp_avg else segments
    count = len(exp_avg) if statistics else 0
    out = like.new_zeros((count, 2, len(STATISTICS_COLUMNS)), dtype=torch.float64)
    for row, values in zip(rows, coefficients.float().tolist(), strict=True):
        tensor, begin, end = row["tensor"], row["begin"], row["end"]
        m = exp_avg[tensor].view(-1)[begin:end]
        v = exp_avg_sq[tensor].view(-1)[begin:end]
        old = tuple(x.to(torch.float32, copy=True) for x in (m, v))
        new_v = _apply(row, "exp_avg_sq", old[1], old[0], values[COEFFICIENTS:], coefficients)
        new_m = _apply(row, "exp_avg", old[0], old[0], values[:COEFFICIENTS], coefficients)
        for moment, (stored, before, after) in enumerate(((m, old[0], new_m), (v, old[1], new_v))):
            if row[f"{MOMENTS[moment]}_rule"] != Code.KEEP:
                stored.copy_(after)
            if statistics:
                _count(out[tensor, moment], before, stored.float())
    if statistics == Statistics.AFTER:
        out[..., [0, 4]] = -1.0
    return out


def launch_table(
    exp_avg: Sequence[torch.Tensor],
    exp_avg_sq: Sequence[torch.Tensor],
    segments: torch.Tensor,
    coefficients: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the table; there is nothing to prepare."""
    _check_lists(exp_avg, exp_avg_sq)
    _check_table(exp_avg, segments, coefficients)
    device = exp_avg[0].device if exp_avg else segments.device
    return torch.empty(0, dtype=torch.uint8, device=device), torch.empty(0, dtype=torch.uint8)


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


def random_bits(key: int, index: torch.Tensor) -> torch.Tensor:
    """53 random bits for each global index: splitmix64 as a counter-based generator.

    Args:
        key: Of the seed and the parameter, as a signed 64-bit number.
        index: int64, any shape.

    References:
        Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    z = key + (index + 1) * _GOLDEN
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return _shift(z ^ _shift(z, 31), 11)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _apply(
    row: dict[str, int],
    moment: str,
    x: torch.Tensor,
    m: torch.Tensor,
    c: list[float],
    coefficients: torch.Tensor,
) -> torch.Tensor:
    code = row[f"{moment}_rule"]
    match code:
        case Code.SCALE:
            return x * c[0]
        case Code.FILL:
            return torch.full_like(x, c[0])
        case Code.FLOOR:
            y = x * c[0]
            return torch.where(y < c[1], c[1], y)
        case Code.PRUNE_MAGNITUDE:
            return torch.where(x.abs() <= c[0], 0.0, x)
        case Code.PRUNE_RANDOM:
            # The probability is the one coefficient that is not rounded to fp32.
            column = MOMENTS.index(moment) * COEFFICIENTS
            limit = round(coefficients[row["row"], column].item() * 2**53)
            bits = random_bits(row[f"{moment}_key"], _global_index(row, x))
            return torch.where(bits < limit, 0.0, x)
        case Code.BATCH_SIZE:
            return _batch_size(m, x, c)
    return x


def _batch_size(m: torch.Tensor, v: torch.Tensor, c: list[float]) -> torch.Tensor:
    """The formula of `megatron_ext.rules.BatchSize`."""
    m_hat, v_hat = m * c[0], v * c[1]
    g2 = (m_hat * m_hat - v_hat * c[2]) * c[3]
    g2 = torch.where(g2 < 0.0, 0.0, g2)
    g2 = torch.where(g2 > v_hat, v_hat, g2)
    return (g2 + (v_hat - g2) * c[4]) * c[5]


def _global_index(row: dict[str, int], x: torch.Tensor) -> torch.Tensor:
    i = row["start"] + torch.arange(len(x), dtype=torch.int64, device=x.device)
    if row["row_length"] == 0:
        return row["base"] + i
    return row["base"] + i // row["row_length"] * row["row_stride"] + i % row["row_length"]


def _count(out: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
    out[0] += before.double().square().sum()
    out[1] += after.double().square().sum()
    magnitude = after.abs()
    largest = torch.where(magnitude.isnan(), 0.0, magnitude)
    if len(largest):
        out[2] = torch.maximum(out[2], largest.max().double())
    out[3] += (~after.isfinite()).sum()
    out[4] += ((before != after) & ~(before.isnan() & after.isnan())).sum()


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
    """The rows of the table by column, in order; ``row`` is their number."""
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
    for i, moment in enumerate(MOMENTS):
        code = row[f"{moment}_rule"]
        if code not in tuple(Code):
            raise RuntimeError(f"{what}: {code} is no rule for {moment}")
        probability = coefficients[row["row"], i * COEFFICIENTS].item()
        if code == Code.PRUNE_RANDOM and not 0.0 <= probability <= 1.0:
            raise RuntimeError(
                f"prune_random: a probability of {probability:g} is not within 0 and 1"
            )
    if row["exp_avg_rule"] == Code.BATCH_SIZE:
        raise RuntimeError(f"{what}: batch_size is a rule for exp_avg_sq, not for exp_avg")
    if row["exp_avg_sq_rule"] == Code.BATCH_SIZE and row["exp_avg_rule"] != Code.KEEP:
        raise RuntimeError(f"{what}: batch_size reads exp_avg, which must be kept beside it")
