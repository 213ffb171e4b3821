"""Find this rank's parameters whose number of rows differs from the checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..plan.decisions import ResumePlan
from ..plan.moments import plan_moments
from ..plan.resized import ResizedParameter, resized_by
from .parameters import held_parameters, shards_of
from .vocabulary import rows_of


def resized_of(
    optimizer: Any,
    model_chunks: Sequence[Any],
    plan: ResumePlan,
    saved_groups: Sequence[Mapping[str, Any]],
) -> tuple[ResizedParameter, ...]:
    """List the resized parameters that this rank's optimizer holds a part of; not collective.

    Args:
        optimizer: A Megatron optimizer.
        model_chunks: The model it was built for.
        plan: The optimizer's plan.
        saved_groups: The checkpoint's param_groups.

    Raises:
        PlanError: A rule cannot be applied.
        HostError: The model's sharded_state_dict does not place a parameter.
    """
    rows = rows_of(optimizer)
    if optimizer.optimizer is None or not rows:
        return ()
    if not any(rows.of(h.model_param) for h in held_parameters(optimizer)):
        return ()
    parameters = {
        s.parameter.name: s.parameter
        for s in shards_of(optimizer, model_chunks)
        if s.parameter.saved_rows is not None
    }
    bare = dict.fromkeys(parameters, 0)
    # Rows without a second moment are not worse off than others: nothing is divided by its root.
    if plan.optimizer.moment("exp_avg_sq") is not None:
        groups = optimizer.optimizer.param_groups
        for decided in plan_moments(plan, list(parameters.values()), saved_groups, groups):
            bare[decided.parameter.name] = resized_by(decided).bare
    return tuple(
        sorted(
            ResizedParameter(name, p.saved_rows or 0, p.rows, bare[name])
            for name, p in parameters.items()
        )
    )
