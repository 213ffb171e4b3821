"""Parameters with another number of rows than in the checkpoint: what a plan means for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import vocabulary
from .cautions import betas_of, fresh_update
from .moment_plan import ParameterPlan, Rows, plan_moments
from .parameters import held_by, shards_of
from .plan import ResumePlan
from .rules import Statistic, registry
from .steps import is_adam


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
        return str(vocabulary.RowChange(self.name, self.saved, self.now, 0))


def resized_of(
    optimizer: Any,
    model_chunks: Sequence[Any],
    plan: ResumePlan,
    saved_groups: Sequence[Mapping[str, Any]],
) -> tuple[ResizedParameter, ...]:
    """The resized parameters of which this rank's optimizer holds a part; not collective.

    Args:
        optimizer: A Megatron optimizer.
        model_chunks: The model it was built for.
        plan: Its plan.
        saved_groups: The checkpoint's param_groups.

    Raises:
        PlanError: A rule cannot be carried out.
        HostError: The model does not say where its parameters lie.
    """
    if optimizer.optimizer is None or not vocabulary.any_change():
        return ()
    if not any(vocabulary.change_of(h.model_param) for h in held_by(optimizer)):
        return ()
    parameters = {
        s.parameter.name: s.parameter
        for s in shards_of(optimizer, model_chunks)
        if s.parameter.saved_rows is not None
    }
    bare = dict.fromkeys(parameters, 0)
    if is_adam(optimizer.optimizer):
        groups = optimizer.optimizer.param_groups
        for decided in plan_moments(plan, list(parameters.values()), saved_groups, groups):
            bare[decided.parameter.name] = resized_by(decided).bare
    return tuple(
        sorted(
            ResizedParameter(name, p.saved_rows or 0, p.rows, bare[name])
            for name, p in parameters.items()
        )
    )


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


def forget(optimizer: Any) -> None:
    """The resume of an optimizer is complete: what was found about its parameters is history."""
    if optimizer.optimizer is not None and vocabulary.any_change():
        for held in held_by(optimizer):
            vocabulary.forget(held.model_param)


def _bare(rows: Rows, first_new: int) -> int:
    """New rows among some whose exp_avg_sq is 0 afterwards, and nobody asked for that."""
    v = rows.exp_avg_sq
    # Whether a rule from a statistic gives new rows a value does not depend on the value.
    rule = registry.of_statistic(v, 1.0) if isinstance(v, Statistic) else v
    return 0 if rule.fills_zeros else max(rows.last - max(rows.first, first_new), 0)
