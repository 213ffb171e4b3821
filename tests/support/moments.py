"""What the tests of the moment ops share: kernels, inputs, and an oracle in numpy and float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from megatron_ext import _ops
from megatron_ext._ops import Segment, Statistics, reference
from megatron_ext._ops.segments import encode
from megatron_ext.rules import (
    BatchSize,
    Fill,
    Floor,
    Keep,
    PruneMagnitude,
    PruneRandom,
    Scale,
    SecondMomentRule,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernel:
    """One implementation of the ops on one device."""

    name: str
    device: str
    transform: Callable[..., torch.Tensor]
    histogram: Callable[..., torch.Tensor]

    def run(
        self,
        exp_avg: Sequence[torch.Tensor],
        exp_avg_sq: Sequence[torch.Tensor],
        segments: Sequence[Segment],
        statistics: Statistics = Statistics.BEFORE_AND_AFTER,
    ) -> torch.Tensor:
        return self.transform(exp_avg, exp_avg_sq, *encode(segments), int(statistics))


REFERENCE = Kernel("reference", "cpu", reference.transform_moments_, reference.magnitude_histogram)


def active(device: str) -> Kernel:
    """What the dispatcher takes on a device."""
    ops = torch.ops.megatron_ext
    native = "native" if _ops.is_native(device) else "reference"  # type: ignore[arg-type]
    return Kernel(f"{native}-{device}", device, ops.transform_moments_, ops.magnitude_histogram)


def rule_pairs(step: int = 100) -> dict[str, tuple[SecondMomentRule, SecondMomentRule]]:
    """Every rule at least once, for exp_avg and exp_avg_sq."""
    return {
        "keep": (Keep(), Keep()),
        "scale": (Scale(0.3), Scale(0.09)),
        "fill": (Fill(0.0), Fill(1.7)),
        "floor": (Floor(0.1, 0.7), Floor(0.25, 1.1)),
        "prune-magnitude": (PruneMagnitude(0.4), PruneMagnitude(0.6)),
        "prune-random": (PruneRandom(0.9, 3), PruneRandom(0.9, 3)),
        "batch-size": (Keep(), BatchSize(4.0, (0.9, 0.95), step)),
        "mixed": (PruneRandom(0.5, -1), Fill(0.0)),
    }


def splitmix64(key: int, index: int) -> int:
    """Output `index` of the stream at `key`, in Python's own integers."""
    mask = (1 << 64) - 1
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def stream_key(seed: int, parameter: int) -> int:
    """The key of a seed and a parameter, as megatron_ext._ops.segments documents it."""
    mask = (1 << 64) - 1
    return splitmix64(splitmix64(seed & mask, 0) ^ (parameter & mask), 0)


def oracle(
    rule: SecondMomentRule, x: np.ndarray, m: np.ndarray, index: np.ndarray, parameter: int
) -> np.ndarray:
    """A rule in float64 from its published formula."""
    x, m = x.astype(np.float64), m.astype(np.float64)
    match rule:
        case Keep():
            return x
        case Scale(factor):
            return factor * x
        case Fill(value):
            return np.full_like(x, value)
        case Floor(minimum, factor):
            return np.maximum(factor * x, minimum)
        case PruneMagnitude(threshold):
            return np.where(np.abs(x) > np.float32(threshold), x, 0.0)
        case PruneRandom(probability, seed):
            key = stream_key(seed, parameter)
            gone = [Fraction(splitmix64(key, int(i)) >> 11, 1 << 53) < probability for i in index]
            return np.where(gone, 0.0, x)
        case BatchSize(ratio, (b1, b2), step):
            m_hat, v_hat = m / (1 - b1**step), x / (1 - b2**step)
            c = (1 - b1) / (1 + b1)
            g2 = np.clip((m_hat**2 - c * v_hat) / (1 - c), 0.0, v_hat)
            return (g2 + (v_hat - g2) / ratio) * (1 - b2**step)
    raise AssertionError(rule)


def expected_statistics(before: torch.Tensor, after: torch.Tensor) -> list[float]:
    """The five columns, from float64 and exact sums."""
    old, new = (x.double().flatten().tolist() for x in (before, after))
    numbers = [abs(x) for x in new if not math.isnan(x)]
    return [
        _square_sum(old),
        _square_sum(new),
        max(numbers, default=0.0),
        float(sum(not math.isfinite(x) for x in new)),
        float(
            sum(
                a != b and not (math.isnan(a) and math.isnan(b))
                for a, b in zip(old, new, strict=True)
            )
        ),
    ]


def _square_sum(values: list[float]) -> float:
    if any(math.isnan(x) for x in values):
        return math.nan
    return math.fsum(x * x for x in values) if all(map(math.isfinite, values)) else math.inf


def moments(n: int, m: torch.dtype, v: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Moments of different sizes and signs, with zeros, subnormals, NaN and infinities."""
    generator = torch.Generator().manual_seed(seed)
    exp_avg = torch.randn(n, generator=generator).to(m)
    exp_avg_sq = (exp_avg.float() ** 2 + torch.rand(n, generator=generator) * 0.1).to(v)
    special = torch.tensor([0.0, -0.0, 1e-40, -3e-45, math.nan, math.inf, -math.inf, 1e30])
    exp_avg[: len(special)] = special[:n].to(m)
    exp_avg_sq[2 : 2 + len(special)] = special[: max(n - 2, 0)].to(v)
    return exp_avg, exp_avg_sq


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, but that any NaN equals any other."""
    as_bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    equal = (a.view(as_bits) == b.view(as_bits)) | (a.isnan() & b.isnan())
    return a.dtype == b.dtype and bool(equal.all())
