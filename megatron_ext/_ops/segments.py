"""The segment table: rules for ranges of elements, as the two tensors that the ops take.

This module defines the columns. ``csrc/element_rule.h`` and ``csrc/read_table.cpp`` follow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from ..base.placement import WHOLE, GlobalIndex
from ..rules import registry
from ..rules.base import ElementRule
from ..rules.elementwise import KEEP
from ..rules.registry import COEFFICIENTS as COEFFICIENTS

#: Columns of the int64 table, which has one row per segment. The segment's elements are ``begin``
#: to ``end`` of tensor ``tensor``. ``start`` to ``row_stride`` give their position in the unsharded
#: parameter (`base.placement.GlobalIndex`). Rules and keys are `ElementRule.code` and `stream_key`.
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
#: Columns of the float64 table: `COEFFICIENTS` for exp_avg, then as many for exp_avg_sq, in the
#: order of `ElementRule.coefficient_names`. The kernels round them to fp32, except the probability
#: of a random pruning.

#: Last dimension of the ops' result: sum of squares before and after; largest absolute value after,
#: ignoring NaN; number of values after that Adam cannot use: NaN, infinite, or negative in
#: exp_avg_sq, whose square root it takes; number of changed elements.
STATISTICS_COLUMNS = ("square_sum_before", "square_sum_after", "largest", "nonfinite", "changed")


class Statistics(IntEnum):
    """The statistics that the ops count.

    ``AFTER`` sets the two columns that need the old values to -1, so that a reset does not read
    the old values.
    """

    NONE = 0
    AFTER = 1
    BEFORE_AND_AFTER = 2


@dataclass(frozen=True)
class Segment:
    """One rule for exp_avg and one for exp_avg_sq over a range of one tensor's elements.

    Args:
        tensor: Position in the lists of exp_avg and exp_avg_sq.
        begin: First element of the range in the flattened tensor.
        end: One past the last element.
        exp_avg: The rule for exp_avg.
        exp_avg_sq: The rule for exp_avg_sq.
        index: Position of the elements in the unsharded parameter, for positional rules.
        parameter: 64-bit number of the parameter, the same on every layout.
    """

    tensor: int
    begin: int
    end: int
    exp_avg: ElementRule = KEEP
    exp_avg_sq: ElementRule = KEEP
    index: GlobalIndex = WHOLE
    parameter: int = 0


def encode(segments: Sequence[Segment]) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode segments as the two tables.

    Returns:
        int64 ``[n, 11]`` with `COLUMNS`, and float64 ``[n, 12]`` with the coefficients, on the CPU.

    Raises:
        PolicyError: A joint rule is for exp_avg, or exp_avg is not kept beside it.
        TypeError: A rule is not registered.
    """
    integers, values = [], []
    for s in segments:
        registry.check_pair(s.exp_avg, s.exp_avg_sq)
        m, v, i = s.exp_avg, s.exp_avg_sq, s.index
        integers.append(
            [
                *(s.tensor, s.begin, s.end, m.code, v.code),
                *(i.start, i.base, i.row_length, i.row_stride),
                *(m.stream_key(s.parameter), v.stream_key(s.parameter)),
            ]
        )
        values.append([*_coefficients(m), *_coefficients(v)])
    width = 2 * COEFFICIENTS
    return (
        torch.tensor(integers, dtype=torch.int64).reshape(-1, len(COLUMNS)),
        torch.tensor(values, dtype=torch.float64).reshape(-1, width),
    )


def _coefficients(rule: ElementRule) -> list[float]:
    values = [float(c) for c in rule.coefficients()]
    if len(values) != len(rule.coefficient_names):
        raise TypeError(
            f"{rule!r} has {len(values)} coefficients; expected {len(rule.coefficient_names)}: "
            f"{', '.join(rule.coefficient_names)}"
        )
    return values + [0.0] * (COEFFICIENTS - len(values))
