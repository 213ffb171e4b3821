"""The rule that fills rows with a statistic of the kept rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from ..errors import PolicyError
from .base import Context, ElementRule, RowStatistic, Rule, Statistic
from .elementwise import Fill
from .form import Form
from .registry import register


@register
@dataclass(frozen=True)
class FillFrom(Rule):
    """Set to a statistic of the same moment over the parameter's kept rows.

    Scaled rows count as kept, with their new values. If one rule fills all rows of a parameter, the
    statistic is over all its rows.

    Args:
        statistic: ``mean`` and ``median`` give one number per parameter. ``column-mean`` gives one
            for each index into the dimensions after the first.
    """

    statistic: RowStatistic

    forms = (
        Form(
            "fill mean",
            "the mean of the rows that are kept",
            r"x' = \mathrm{mean}(x_\mathrm{kept})",
            "D",
            values=("mean",),
        ),
        Form(
            "fill median",
            "their median (exp_avg_sq only: exp_avg has two signs)",
            r"v' = \mathrm{median}(v_\mathrm{kept})",
            "D",
            values=("median",),
            moments=("exp_avg_sq",),
            because="is for exp_avg_sq; exp_avg has two signs: use 'fill mean' or 'reset'",
        ),
        Form(
            "fill column-mean",
            "for each column the mean of the rows that are kept",
            r"x'_{i j} = \mathrm{mean}_k(x_{k j}), k \; \mathrm{kept}",
            "D",
            values=("column-mean",),
        ),
    )
    keeps_bias = False
    reads_old = True
    statistics = get_args(RowStatistic)

    def __post_init__(self) -> None:
        if self.statistic not in get_args(RowStatistic):
            raise PolicyError(
                f"fill: expected a number or one of {', '.join(get_args(RowStatistic))}, found "
                f"{self.statistic!r}"
            )

    def resolve(self, context: Context) -> Statistic:
        """Return the statistic of the kept rows."""
        rows, factor = context.kept_rows(self.form.write(self))
        return Statistic(context.name, context.key, self.statistic, rows, factor=factor)

    @staticmethod
    def of_statistic(value: float) -> ElementRule:
        """Return a fill with the value."""
        return Fill(value)
