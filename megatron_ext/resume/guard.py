r"""Check the first resumed step against the plan. Pure.

The first step must use the planned hyperparameters. After it, the norm of each moment must be a
possible result of one step from the loaded moment. With the norm of the step's gradient,
:math:`c`, and the norm :math:`\|\cdot\|` over this rank's elements, an average of order n with the
decay b obeys

.. math::

    \left| \|m_1\| - b \|m_0\| \right| \le (1 - b) c \quad (n = 1), \qquad
    0 \le \|v_1\| - b \|v_0\| \le (1 - b) c^2 \quad (n = 2)

and a sum the same without the factor :math:`1 - b`. The bounds follow from the updates
(`megatron_ext.host.optimizers`), the triangle inequality, :math:`v \ge 0` and
:math:`\|g^2\| \le \|g\|^2`. A rotation of the basis keeps them. Of the average of a normalised
gradient nothing follows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.values import plain
from ..host.optimizers import TABLE, OptimizerState

#: Relative tolerance, because fp32 sums and moments in bf16 are not exact.
_ROUNDING = 0.01

#: The hyperparameters of all optimizers, each once.
_CHECKED = tuple(dict.fromkeys(key for row in TABLE for key in row.hyperparameters))

_CAUSE = (
    "Something has changed the optimizer between the load and the first step: the training "
    "script, a callback, or another extension of Megatron. Find it, or pass --no-selective-guard "
    "(guard=False in Python)"
)


@dataclass(frozen=True)
class GroupValues:
    """The hyperparameters of one param_group at a step.

    Args:
        optimizer: Position of its optimizer in the chain.
        group: Position of the group in the optimizer.
        values: Its hyperparameters, such as ``lr`` and ``betas``.
    """

    optimizer: int
    group: int
    values: Mapping[str, Any]

    @classmethod
    def of(cls, optimizer: int, group: int, values: Mapping[str, Any]) -> GroupValues:
        """Take the values from a param_group."""
        known = {k: _comparable(values[k]) for k in _CHECKED if values.get(k) is not None}
        return cls(optimizer, group, known)


def wrong_hyperparameters(planned: Sequence[GroupValues], used: Sequence[GroupValues]) -> str:
    """Describe the differences between the first step's hyperparameters and the planned ones.

    Args:
        planned: The planned values of all groups, in order.
        used: The values in use, for the same groups.

    Returns:
        A message, empty if there is no difference.
    """
    lines = []
    for plan, found in zip(planned, used, strict=True):
        for key, value in plan.values.items():
            other = found.values.get(key)
            if other != value:
                lines.append(
                    f"optimizer {plan.optimizer} param_group {plan.group}: {key} is {other}, "
                    f"expected {value}"
                )
    if not lines:
        return ""
    listing = "; ".join(lines)
    return f"the first resumed step does not use the planned hyperparameters: {listing}. {_CAUSE}"


def wrong_moments(
    optimizer: int,
    state: OptimizerState,
    decays: Sequence[float],
    before: Sequence[float],
    after: Sequence[float],
    gradient: float,
) -> str:
    """Describe moment norms that cannot be the result of one step from the loaded moments.

    Args:
        optimizer: Position in the chain.
        state: Its state.
        decays: The decay b of each moment at the step.
        before: Euclidean norm of each moment after the load, on this rank.
        after: The same norms after the step.
        gradient: An upper bound of the norm of this rank's part of the step's gradient.

    Returns:
        A message, empty if all norms are possible.
    """
    lines = []
    for moment, b, old, found in zip(state.moments, decays, before, after, strict=True):
        if not moment.of_gradient:
            continue
        kept = b * old
        added = gradient**moment.order * ((1.0 - b) if moment.average else 1.0)
        low, high = (max(kept - added, 0.0) if moment.order == 1 else kept), kept + added
        if not low * (1 - _ROUNDING) <= found <= high * (1 + _ROUNDING):
            lines.append(f"{moment.tensor} has norm {found:.6g}, expected {low:.6g} to {high:.6g}")
    if not lines:
        return ""
    what = "an Adam update" if state.adam else f"an update by {state.name}"
    norms = ", ".join(f"{norm:.6g}" for norm in before)
    return (
        f"optimizer {optimizer}: 1 step after the load the moment norms cannot be the result of "
        f"{what} of the loaded moments (norms {norms}) with a gradient of norm {gradient:.6g}: "
        f"{'; '.join(lines)}. {_CAUSE}"
    )


def _comparable(value: Any) -> Any:
    value = plain(value)
    return tuple(value) if isinstance(value, list) else value
