"""Parameters whose number of rows differs from the checkpoint. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..rules import registry
from ..rules.base import Statistic
from .cautions import betas_of, fresh_update
from .decisions import ResumePlan
from .parameters import ParameterPlan, Rows


@dataclass(frozen=True)
class RowChange:
    """The rows of one model parameter, in the model and in the checkpoint.

    Args:
        key: Its checkpoint key.
        saved: Rows of the unsharded parameter in the checkpoint.
        now: Rows of the unsharded parameter in the model.
        first_new: First row of this rank's shard that the checkpoint does not have; the number of
            the shard's rows if the checkpoint has them all.
    """

    key: str
    saved: int
    now: int
    first_new: int

    def __str__(self) -> str:
        """Write the change for the log."""
        here = f"{self.key}: {self.saved} rows in the checkpoint, {self.now} now: the"
        if self.now > self.saved:
            new = self.now - self.saved
            return f"{here} weights of the {new} new rows [{self.saved}:] stay as initialised"
        gone = self.saved - self.now
        return f"{here} {gone} rows [{self.now}:] of the checkpoint are dropped"


@dataclass(frozen=True, order=True)
class ResizedParameter:
    """One unsharded parameter whose number of rows differs from the checkpoint.

    Args:
        name: Global name.
        saved: Rows in the checkpoint.
        now: Rows in the model.
        bare: New rows whose exp_avg_sq stays 0 because no rule fills it.
    """

    name: str
    saved: int
    now: int
    bare: int = 0

    @property
    def new(self) -> int:
        """Rows that the checkpoint does not have; their weights stay as initialised."""
        return max(self.now - self.saved, 0)

    @property
    def dropped(self) -> int:
        """Rows of the checkpoint that the model does not have."""
        return max(self.saved - self.now, 0)

    def __str__(self) -> str:
        """Write the change for the log."""
        return str(RowChange(self.name, self.saved, self.now, 0))


def resized_by(decided: ParameterPlan) -> ResizedParameter:
    """Summarise the row change of one parameter.

    Args:
        decided: The plan for its moments. The parameter's `saved_rows` is set.
    """
    parameter = decided.parameter
    first = parameter.saved_rows or 0
    bare = sum(_bare(rows, first) for rows in decided.rows)
    return ResizedParameter(parameter.name, first, parameter.rows, bare)


def warnings_of(plan: ResumePlan, resized: Sequence[ResizedParameter]) -> Iterator[str]:
    """Warn about risks of resized parameters, with the size of the effect.

    Args:
        plan: The plan of the optimizer that updates them.
        resized: The resized parameters of all ranks.
    """
    for one in resized:
        if one.dropped:
            yield f"{one}, weights and moments. If they were not just padding, tokens are lost"
        if not one.bare or not plan.step:
            continue
        for betas in betas_of(plan):
            yield (
                f"{one.name}: the moments of {one.bare} new rows are 0 while step stays at "
                f"{plan.step}: they get no bias correction, and at betas {betas[0]:g}, "
                f"{betas[1]:g} their first update is {fresh_update(betas, plan.step):.2f} lr. The "
                f"remedy is --selective-rule '{one.name}[{one.saved}:]' reset 'fill column-mean'"
            )


def _bare(rows: Rows, first_new: int) -> int:
    """Count the new rows whose exp_avg_sq stays 0 because no rule fills it."""
    v = rows.exp_avg_sq
    # Any value of the statistic will do: whether the rule fills zeros does not depend on it.
    rule = registry.of_statistic(v, 1.0) if isinstance(v, Statistic) else v
    return 0 if rule.fills_zeros else max(rows.last - max(rows.first, first_new), 0)
