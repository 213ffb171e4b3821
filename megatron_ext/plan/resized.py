"""Parameters with another number of rows than the checkpoint. Pure."""

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
    """The rows of one model parameter, here and in the checkpoint.

    Args:
        key: Its checkpoint key.
        saved: Rows of the unsharded parameter in the checkpoint.
        now: Rows of the unsharded parameter in the model.
        first_new: First row of this rank's shard that the checkpoint does not have; the number of
            the shard's rows if it has them all.
    """

    key: str
    saved: int
    now: int
    first_new: int

    def __str__(self) -> str:
        """As it stands in the log."""
        here = f"{self.key}: {self.saved} rows in the checkpoint, {self.now} now: the"
        if self.now > self.saved:
            new = self.now - self.saved
            return f"{here} weights of the {new} new rows [{self.saved}:] stay as initialised"
        gone = self.saved - self.now
        return f"{here} {gone} rows [{self.now}:] of the checkpoint are dropped"


@dataclass(frozen=True, order=True)
class ResizedParameter:
    """One unsharded parameter whose rows are not those of the checkpoint.

    Args:
        name: Global name.
        saved: Rows in the checkpoint.
        now: Rows in the model.
        bare: New rows whose exp_avg_sq stays 0 without a rule that says so.
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
        """As it stands in the log."""
        return str(RowChange(self.name, self.saved, self.now, 0))


def resized_by(decided: ParameterPlan) -> ResizedParameter:
    """What a plan leaves of the new rows of one parameter.

    Args:
        decided: The plan for its moments; the parameter has `saved_rows`.
    """
    parameter = decided.parameter
    first = parameter.saved_rows or 0
    bare = sum(_bare(rows, first) for rows in decided.rows)
    return ResizedParameter(parameter.name, first, parameter.rows, bare)


def warnings_of(plan: ResumePlan, resized: Sequence[ResizedParameter]) -> Iterator[str]:
    """What is dangerous about resized parameters, with the number.

    Args:
        plan: The plan of the optimizer that updates them.
        resized: On all ranks.
    """
    for one in resized:
        if one.dropped:
            yield f"{one}, weights and moments; if they were more than padding, tokens are lost"
        if not one.bare or not plan.step:
            continue
        for betas in betas_of(plan):
            yield (
                f"{one.name}: the moments of {one.bare} new rows are 0 while step stays at "
                f"{plan.step}: there is no bias correction for them, and at betas {betas[0]:g}, "
                f"{betas[1]:g} their first update is {fresh_update(betas, plan.step):.2f} lr. The "
                f"remedy is --selective-rule '{one.name}[{one.saved}:]' reset 'fill column-mean'"
            )


def _bare(rows: Rows, first_new: int) -> int:
    """New rows among some whose exp_avg_sq is 0 afterwards, and nobody asked for that."""
    v = rows.exp_avg_sq
    # Whether a rule from a statistic gives new rows a value does not depend on the value.
    rule = registry.of_statistic(v, 1.0) if isinstance(v, Statistic) else v
    return 0 if rule.fills_zeros else max(rows.last - max(rows.first, first_new), 0)
