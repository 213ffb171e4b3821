"""The segment table: rules over ranges of elements, as the two tensors that the ops take.

This is the one place that says what a column means; ``csrc/element_rule.h`` and
``csrc/read_table.cpp`` follow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from ..errors import PolicyError
from ..layout import WHOLE, GlobalIndex
from ..rules import (
    KEEP,
    BatchSize,
    Fill,
    Floor,
    Keep,
    MomentRule,
    PruneMagnitude,
    PruneRandom,
    Scale,
    SecondMomentRule,
)

#: Columns of the int64 table, one row a segment. Row r's elements are ``begin`` to ``end`` of
#: tensor ``tensor``; ``start`` to ``row_stride`` say where they lie in the unsharded parameter
#: (`megatron_ext.layout.GlobalIndex`); the keys are those of `Code.PRUNE_RANDOM`.
COLUMNS = (
    "tensor",
    "begin",
    "end",
    "exp_avg_rule",
    "exp_avg_sq_rule",
    "start",
    "base",
    "row_length",
    "row_stride",
    "exp_avg_key",
    "exp_avg_sq_key",
)
#: Columns of the float64 table: six for exp_avg, six for exp_avg_sq. The kernels round each to
#: fp32, but for the probability of `Code.PRUNE_RANDOM`.
COEFFICIENTS = 6

#: Last dimension of the ops' result: sum of squares before and after, largest absolute value that
#: is no NaN, number of values that are not finite (both after), number of changed elements.
STATISTICS_COLUMNS = ("square_sum_before", "square_sum_after", "largest", "nonfinite", "changed")

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


class Code(IntEnum):
    """Numbers of the element rules, and their coefficients."""

    KEEP = 0
    SCALE = 1  # factor
    FILL = 2  # value
    FLOOR = 3  # factor, minimum
    PRUNE_MAGNITUDE = 4  # threshold
    PRUNE_RANDOM = 5  # probability
    BATCH_SIZE = 6  # 1/(1-b1^t), 1/(1-b2^t), c = (1-b1)/(1+b1), 1/(1-c), 1/k, 1-b2^t


class Statistics(IntEnum):
    """What the ops count.

    ``AFTER`` leaves the two columns that need the old values at -1, so that a reset need not read
    them.
    """

    NONE = 0
    AFTER = 1
    BEFORE_AND_AFTER = 2


@dataclass(frozen=True)
class Segment:
    """One rule for exp_avg and one for exp_avg_sq over a range of one tensor's elements.

    Args:
        tensor: Position in the lists of exp_avg and exp_avg_sq.
        begin: First element, in the flattened tensor.
        end: One past the last.
        exp_avg: What is done to exp_avg.
        exp_avg_sq: What is done to exp_avg_sq.
        index: Where the elements lie in the unsharded parameter; only `PruneRandom` asks.
        parameter: 64-bit number of the parameter, the same on every layout.
    """

    tensor: int
    begin: int
    end: int
    exp_avg: MomentRule = KEEP
    exp_avg_sq: SecondMomentRule = KEEP
    index: GlobalIndex = WHOLE
    parameter: int = 0


def encode(segments: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables of some segments.

    Returns:
        int64 ``[n, 11]`` with `COLUMNS`, and float64 ``[n, 12]`` with the coefficients, on the CPU.

    Raises:
        PolicyError: `BatchSize` for exp_avg, or beside anything but `Keep` for exp_avg.
    """
    integers, values = [], []
    for s in segments:
        if isinstance(s.exp_avg, BatchSize):
            raise PolicyError("BatchSize is a rule for exp_avg_sq, not for exp_avg")
        if isinstance(s.exp_avg_sq, BatchSize) and not isinstance(s.exp_avg, Keep):
            raise PolicyError(
                f"BatchSize for exp_avg_sq reads exp_avg, which must be kept, not {s.exp_avg}"
            )
        code_m, values_m = _code(s.exp_avg)
        code_v, values_v = _code(s.exp_avg_sq)
        i = s.index
        integers.append(
            [
                *(s.tensor, s.begin, s.end, code_m, code_v),
                *(i.start, i.base, i.row_length, i.row_stride),
                *(_key(s.exp_avg, s.parameter), _key(s.exp_avg_sq, s.parameter)),
            ]
        )
        values.append([*values_m, *values_v])
    width = 2 * COEFFICIENTS
    return (
        torch.tensor(integers, dtype=torch.int64).reshape(-1, len(COLUMNS)),
        torch.tensor(values, dtype=torch.float64).reshape(-1, width),
    )


def _code(rule: SecondMomentRule) -> tuple[Code, list[float]]:
    code, values = Code.KEEP, []
    match rule:
        case Scale(factor):
            code, values = Code.SCALE, [factor]
        case Fill(value):
            code, values = Code.FILL, [value]
        case Floor(minimum, factor):
            code, values = Code.FLOOR, [factor, minimum]
        case PruneMagnitude(threshold):
            code, values = Code.PRUNE_MAGNITUDE, [threshold]
        case PruneRandom(probability):
            code, values = Code.PRUNE_RANDOM, [probability]
        case BatchSize(ratio, (b1, b2), step):
            c = (1 - b1) / (1 + b1)
            corrections = [1 / (1 - b1**step), 1 / (1 - b2**step)]
            code, values = Code.BATCH_SIZE, [*corrections, c, 1 / (1 - c), 1 / ratio, 1 - b2**step]
    return code, [float(v) for v in values] + [0.0] * (COEFFICIENTS - len(values))


def _key(rule: SecondMomentRule, parameter: int) -> int:
    if not isinstance(rule, PruneRandom):
        return 0
    key = _mix(_mix(rule.seed & _MASK) ^ (parameter & _MASK))
    return key - (1 << 64) if key >> 63 else key


def _mix(z: int) -> int:
    """splitmix64 (Steele, Lea and Flood, OOPSLA 2014), one output from a 64-bit state."""
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
