r"""Check the first resumed step against the plan. Pure.

The first step must use the planned hyperparameters. After it, the moment norms must be a possible
result of one Adam update of the loaded moments. With the norm of the step's gradient, :math:`c`,
and the norm :math:`\|\cdot\|` over this rank's elements:

.. math::

    \left| \|m_1\| - b_1 \|m_0\| \right| \le (1 - b_1) c, \qquad
    0 \le \|v_1\| - b_2 \|v_0\| \le (1 - b_2) c^2

The bounds follow from Adam's definition (arXiv 1412.6980), the triangle inequality,
:math:`v \ge 0` and :math:`\|g^2\| \le \|g\|^2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.values import plain

#: Relative tolerance, because fp32 sums and moments in bf16 are not exact.
_ROUNDING = 0.01

_CHECKED = ("lr", "weight_decay", "betas", "eps")

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
        values: Those of ``lr``, ``weight_decay``, ``betas`` and ``eps`` that the group has.
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
    betas: tuple[float, float],
    before: tuple[float, float],
    after: tuple[float, float],
    gradient: float,
) -> str:
    """Describe moment norms that cannot be the result of an Adam update of the loaded moments.

    Args:
        optimizer: Position in the chain.
        betas: b1 and b2 of the step.
        before: Euclidean norms of exp_avg and exp_avg_sq after the load, on this rank.
        after: The same norms after the step.
        gradient: An upper bound of the norm of this rank's part of the step's gradient.

    Returns:
        A message, empty if both norms are possible.
    """
    kept = betas[0] * before[0], betas[1] * before[1]
    added = (1.0 - betas[0]) * gradient, (1.0 - betas[1]) * gradient * gradient
    bounds = (
        ("exp_avg", max(kept[0] - added[0], 0.0), kept[0] + added[0], after[0]),
        ("exp_avg_sq", kept[1], kept[1] + added[1], after[1]),
    )
    lines = [
        f"{key} has norm {found:.6g}, expected {low:.6g} to {high:.6g}"
        for key, low, high, found in bounds
        if not low * (1 - _ROUNDING) <= found <= high * (1 + _ROUNDING)
    ]
    if not lines:
        return ""
    return (
        f"optimizer {optimizer}: 1 step after the load the moment norms cannot be the result of an "
        f"Adam update of the loaded moments (norms {before[0]:.6g}, {before[1]:.6g}) with a "
        f"gradient of norm {gradient:.6g}: {'; '.join(lines)}. {_CAUSE}"
    )


def _comparable(value: Any) -> Any:
    value = plain(value)
    return tuple(value) if isinstance(value, list) else value
