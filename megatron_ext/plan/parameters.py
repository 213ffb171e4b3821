"""Unsharded parameters and the rules decided for their rows. Plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..rules.base import ElementRule, Statistic


@dataclass(frozen=True)
class Parameter:
    """One unsharded parameter.

    Args:
        name: Global name.
        shape: Unsharded shape.
        group: Position of its param_group in the current optimizer.
        saved_rows: Its number of rows in the checkpoint, if that differs; else None.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    saved_rows: int | None = None

    @property
    def rows(self) -> int:
        """Length of dimension 0; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def row_elements(self) -> int:
        """Number of elements in one row."""
        return math.prod(self.shape[1:])

    @property
    def grown(self) -> bool:
        """Whether it has rows that the checkpoint does not have."""
        return self.saved_rows is not None and self.saved_rows < self.rows

    def old(self, spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """Restrict row ranges to the rows in the checkpoint; new rows have no saved moments."""
        end = self.rows if self.saved_rows is None else min(self.saved_rows, self.rows)
        return tuple((first, min(last, end)) for first, last in spans if first < end)


@dataclass(frozen=True)
class Rows:
    """The rules for some rows of a parameter.

    Args:
        first: First row.
        last: One past the last row.
        exp_avg: The element rule, or the statistic from which it will be computed.
        exp_avg_sq: The element rule, or the statistic from which it will be computed.
        rule: Position of the policy's rule, or None for its preset.
    """

    first: int
    last: int
    exp_avg: ElementRule | Statistic
    exp_avg_sq: ElementRule | Statistic
    rule: int | None


@dataclass(frozen=True)
class ParameterPlan:
    """The rules for one unsharded parameter; the row ranges are contiguous."""

    parameter: Parameter
    rows: tuple[Rows, ...]

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """The statistics that have to be computed first, each once."""
        both = (x for r in self.rows for x in (r.exp_avg, r.exp_avg_sq))
        return tuple(dict.fromkeys(x for x in both if isinstance(x, Statistic)))
