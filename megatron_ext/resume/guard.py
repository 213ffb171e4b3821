r"""Check the first resumed steps against the plan. Pure.

The first step must use the planned hyperparameters. At the first logging step, the moment norms
must be a possible result of k Adam updates on the loaded moments. With the norm of each step's
clipped gradient, :math:`c_i`, and the norm :math:`\|\cdot\|` over this rank's elements:

.. math::

    \left| \|m_k\| - b_1^k \|m_0\| \right| \le (1 - b_1) \sum_{i=1}^k b_1^{k-i} c_i, \qquad
    0 \le \|v_k\| - b_2^k \|v_0\| \le (1 - b_2) \sum_{i=1}^k b_2^{k-i} c_i^2

The bounds follow from Adam's definition (arXiv 1412.6980), the triangle inequality,
:math:`v \ge 0` and :math:`\|g^2\| \le \|g\|^2`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..base.values import plain

#: Relative tolerance, because fp32 sums of k steps and moments in bf16 are not exact.
_ROUNDING = 0.01

_CHECKED = ("lr", "weight_decay", "betas", "eps")

_CAUSE = (
    "Something has changed the optimizer between the load and the first steps: the training "
    "script, a callback, or another extension of Megatron. Find it, or pass --no-selective-guard"
)


@dataclass
class Watch:
    """The guard's record of the steps since the load.

    Args:
        gradients: Norm of each successful step's gradient before clipping, as Megatron returned it.
        started: Whether the first step has been checked.
    """

    gradients: list[Any] = field(default_factory=list)
    started: bool = False


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
    gradients: Sequence[float],
) -> str:
    """Describe moment norms that cannot be the result of Adam updates on the loaded moments.

    Args:
        optimizer: Position in the chain.
        betas: b1 and b2 of the steps.
        before: Euclidean norms of exp_avg and exp_avg_sq after the load, on this rank.
        after: The same norms now.
        gradients: For each step since the load, an upper bound of the norm of this rank's part of
            the clipped gradient.

    Returns:
        A message, empty if both norms are possible.
    """
    bounds = (
        ("exp_avg", *_first(betas[0], before[0], gradients), after[0]),
        ("exp_avg_sq", *_second(betas[1], before[1], gradients), after[1]),
    )
    lines = [
        f"{key} has norm {found:.6g}, expected {low:.6g} to {high:.6g}"
        for key, low, high, found in bounds
        if not low * (1 - _ROUNDING) <= found <= high * (1 + _ROUNDING)
    ]
    if not lines:
        return ""
    return (
        f"optimizer {optimizer}: {steps_after(len(gradients))} the load the moment norms "
        f"cannot be the result of Adam updates on the loaded moments (norms {before[0]:.6g}, "
        f"{before[1]:.6g}) with gradients of norm up to {max(gradients, default=0.0):.6g}: "
        f"{'; '.join(lines)}. {_CAUSE}"
    )


def steps_after(count: int) -> str:
    """Write a number of steps as "k steps after"."""
    return f"{count} step after" if count == 1 else f"{count} steps after"


def _first(beta: float, norm: float, gradients: Sequence[float]) -> tuple[float, float]:
    kept = beta ** len(gradients) * norm
    added = _average(beta, gradients)
    return max(kept - added, 0.0), kept + added


def _second(beta: float, norm: float, gradients: Sequence[float]) -> tuple[float, float]:
    kept = beta ** len(gradients) * norm
    return kept, kept + _average(beta, [g * g for g in gradients])


def _average(beta: float, values: Sequence[float]) -> float:
    steps = len(values)
    return math.fsum((1.0 - beta) * beta ** (steps - 1 - i) * x for i, x in enumerate(values))


def _comparable(value: Any) -> Any:
    value = plain(value)
    return tuple(value) if isinstance(value, list) else value
