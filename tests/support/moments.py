"""What the tests of the moment ops share: kernels, inputs and expected results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_ext._ops import reference
from megatron_ext._ops.native import is_native
from megatron_ext._ops.segments import Segment, Statistics, encode
from megatron_ext.rules import registry
from megatron_ext.rules.base import ElementRule, Rule
from megatron_ext.rules.elementwise import Fill
from megatron_ext.rules.prune import PruneRandom

from .rule_oracles import ORACLES, Elements

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Kernel:
    """One implementation of the ops on one device."""

    name: str
    device: str
    transform: Callable[..., torch.Tensor]
    histogram: Callable[..., torch.Tensor]
    compare: Callable[..., torch.Tensor]

    def run(
        self,
        exp_avg: Sequence[torch.Tensor],
        exp_avg_sq: Sequence[torch.Tensor],
        segments: Sequence[Segment],
        statistics: Statistics = Statistics.BEFORE_AND_AFTER,
    ) -> torch.Tensor:
        return self.transform(exp_avg, exp_avg_sq, *encode(segments), int(statistics))


REFERENCE = Kernel(
    "reference",
    "cpu",
    reference.transform_moments_,
    reference.magnitude_histogram,
    reference.compare_weights,
)


def active(device: str) -> Kernel:
    """What the dispatcher takes on a device."""
    ops = torch.ops.megatron_ext
    native = "native" if is_native(device) else "reference"  # type: ignore[arg-type]
    return Kernel(
        f"{native}-{device}",
        device,
        ops.transform_moments_,
        ops.magnitude_histogram,
        ops.compare_weights,
    )


def rule_pairs() -> dict[str, tuple[ElementRule, ElementRule]]:
    """Every registered element rule, for exp_avg and exp_avg_sq, and one pair of two rules.

    A rule without an oracle has no case; `tests/rules/test_rules.py` fails for it.
    """
    cases = ((r.name, ORACLES[r]) for r in registry.element_rules().values() if r in ORACLES)
    pairs = {name: (found.exp_avg, found.exp_avg_sq) for name, found in cases}
    return {**pairs, "mixed": (PruneRandom(0.5, -1), Fill(0.0))}  # type: ignore[dict-item]


def oracle(
    rule: Rule,
    x: np.ndarray,
    m: np.ndarray,
    index: np.ndarray,
    parameter: int,
    key: str = "exp_avg_sq",
) -> np.ndarray:
    """A rule in float64 from its published formula."""
    elements = Elements(x.astype(np.float64), m.astype(np.float64), index, parameter, key)
    return ORACLES[type(rule)].formula(rule, elements)


def expected_statistics(before: torch.Tensor, after: torch.Tensor, key: str) -> list[float]:
    """The five columns of a moment, from float64 and exact sums."""
    old, new = (x.double().flatten().tolist() for x in (before, after))
    numbers = [abs(x) for x in new if not math.isnan(x)]
    return [
        _square_sum(old),
        _square_sum(new),
        max(numbers, default=0.0),
        float(sum(not math.isfinite(x) or (key == "exp_avg_sq" and x < 0.0) for x in new)),
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


def weight_pairs(sizes: Sequence[int] = (40_001, 1, 0, 71)) -> list[tuple[torch.Tensor, ...]]:
    """Master weights and weights in every pair of dtypes, of which one in 97 does not fit."""
    pairs = []
    for n in sizes:
        for a, b in itertools.product(DTYPES, DTYPES):
            master = moments(n, a, a, n)[0]
            weight = master.to(b, copy=True)
            weight[::97] = weight[::97] * 1.5 - 0.25
            weight[1:5:3].neg_()  # a zero, and a NaN
            pairs.append((master, weight))
    return pairs


def expected_differences(master: torch.Tensor, weight: torch.Tensor) -> tuple[int, float]:
    """How many elements differ and by how much, each rounded in exact arithmetic."""
    wrong, largest = 0, 0.0
    for value, found in zip(master.double().tolist(), weight.double().tolist(), strict=True):
        rounded = nearest(value, weight.dtype)
        same = rounded == found and math.copysign(1, rounded) == math.copysign(1, found)
        if not same and not (math.isnan(rounded) and math.isnan(found)):
            wrong += 1
            distance = float(np.float32(abs(rounded - found)))
            largest = largest if math.isnan(distance) else max(largest, distance)
    return wrong, largest


def nearest(x: float, dtype: torch.dtype) -> float:
    """The nearest number of a binary floating-point format, ties to even."""
    if x == 0.0 or not math.isfinite(x):
        return x
    bits, smallest = {
        torch.float32: (24, -149),
        torch.bfloat16: (8, -133),
        torch.float16: (11, -24),
    }[dtype]
    unit = max(math.frexp(x)[1] - bits, smallest)
    # round() takes ties to even.
    rounded = math.copysign(math.ldexp(float(round(math.ldexp(x, -unit))), unit), x)
    return rounded if abs(rounded) <= torch.finfo(dtype).max else math.copysign(math.inf, x)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, but that any NaN equals any other."""
    as_bits = torch.int32 if a.dtype == torch.float32 else torch.int16
    equal = (a.view(as_bits) == b.view(as_bits)) | (a.isnan() & b.isnan())
    return a.dtype == b.dtype and bool(equal.all())
