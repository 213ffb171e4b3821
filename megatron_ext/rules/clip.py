r"""The rule that limits the magnitude of a moment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import ElementRule, Operands, require
from .form import Form
from .registry import register

if TYPE_CHECKING:
    import torch


@register
@dataclass(frozen=True)
class Clip(ElementRule):
    r"""Limit the magnitude, for example after a spike of the gradient. A NaN stays NaN.

    .. math:: x' = \min(\max(x, -c), c)

    Args:
        limit: c, finite and at least 0, in the units of the moment.
    """

    limit: float

    forms = (
        Form(
            "clip X",
            "x' = min(max(x, -X), X)",
            r"x' = \min(\max(x, -X), X)",
            "D",
        ),
    )
    keeps_bias = True
    reads_old = True
    name = "clip"
    code = 7
    kind = "pointwise"
    coefficient_names = ("limit",)

    def __post_init__(self) -> None:
        ok = math.isfinite(self.limit) and self.limit >= 0.0
        require(ok, "Clip.limit", self.limit, "a finite number of at least 0")

    def coefficients(self) -> tuple[float, ...]:
        """Return the limit."""
        return (self.limit,)

    @staticmethod
    def reference(x: torch.Tensor, operands: Operands) -> torch.Tensor:
        """Limit the values. A NaN stays, because it is neither above nor below the limit."""
        limit = operands.coefficients[0]
        return x.masked_fill(x > limit, limit).masked_fill(x < -limit, -limit)
