r"""Rules that depend only on the element's value: keep, scale, fill (0 is a reset) and floor."""

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
class Keep(ElementRule):
    """Keep the element unchanged."""

    forms = (Form("keep", "as it is in the checkpoint", "x' = x", "D"),)
    keeps_bias = True
    reads_old = True
    name = "keep"
    code = 0
    kind = "kept"
    coefficient_names = ()

    def coefficients(self) -> tuple[float, ...]:
        """Return no coefficients."""
        return ()

    @staticmethod
    def reference(x: torch.Tensor, operands: Operands) -> torch.Tensor:
        """Return `x` itself. The values are not stored again, so that a NaN keeps its bits."""
        return x

    @property
    def multiplier(self) -> float:
        """The factor 1."""
        return 1.0


#: The shared instance of `Keep`.
KEEP = Keep()


@register
@dataclass(frozen=True)
class Fill(ElementRule):
    """Set to a constant; 0 is a reset. The old value is not read.

    Args:
        value: The constant, finite, in the units of the moment.
    """

    value: float = 0.0

    forms = (
        Form(
            "reset",
            "0; the old value is not read",
            "x' = 0",
            "full reset: P 2306.17833, 2501.06842",
            values=(0.0,),
        ),
        Form("fill X", "x' = X", "x' = X", "D"),
    )
    keeps_bias = False
    reads_old = False
    name = "fill"
    code = 2
    kind = "pointwise"
    coefficient_names = ("value",)

    def __post_init__(self) -> None:
        require(math.isfinite(self.value), "Fill.value", self.value, "a finite number")

    def coefficients(self) -> tuple[float, ...]:
        """Return the value."""
        return (self.value,)

    @staticmethod
    def reference(x: torch.Tensor, operands: Operands) -> torch.Tensor:
        """Fill with the value."""
        return x.new_full(x.shape, operands.coefficients[0])

    @property
    def makes_negative(self) -> bool:
        """Whether the value is negative."""
        return self.value < 0.0

    @property
    def fills_zeros(self) -> bool:
        """True, also for the value 0, because the policy then requests 0."""
        return True


#: A fill of 0.
RESET = Fill(0.0)


@register
@dataclass(frozen=True)
class Scale(ElementRule):
    r"""Multiply by a factor.

    .. math:: x' = a x

    Args:
        factor: a, finite.
    """

    factor: float

    forms = (Form("scale A", "x' = A x", "x' = A x", "D"),)
    keeps_bias = True
    reads_old = True
    name = "scale"
    code = 1
    kind = "pointwise"
    coefficient_names = ("factor",)

    def __post_init__(self) -> None:
        require(math.isfinite(self.factor), "Scale.factor", self.factor, "a finite number")

    def coefficients(self) -> tuple[float, ...]:
        """Return the factor."""
        return (self.factor,)

    @staticmethod
    def reference(x: torch.Tensor, operands: Operands) -> torch.Tensor:
        """Multiply by the factor."""
        return x * operands.coefficients[0]

    @property
    def multiplier(self) -> float:
        """The factor."""
        return self.factor

    @property
    def makes_negative(self) -> bool:
        """Whether the factor is negative."""
        return self.factor < 0.0


@register
@dataclass(frozen=True)
class Floor(ElementRule):
    r"""Raise to a minimum after scaling, to bound the division by sqrt(v).

    .. math:: x' = \max(a x, f)

    Args:
        minimum: f, finite, in the units of the moment.
        factor: a, finite.
    """

    minimum: float
    factor: float = 1.0

    forms = (
        Form(
            "floor X",
            "x' = max(x, X)",
            r"v' = \max(v, X)",
            "D",
            moments=("exp_avg_sq",),
            because="is for exp_avg_sq, whose root is divided by, not for exp_avg",
        ),
    )
    keeps_bias = True
    reads_old = True
    name = "floor"
    code = 3
    kind = "pointwise"
    coefficient_names = ("factor", "minimum")

    def __post_init__(self) -> None:
        require(math.isfinite(self.minimum), "Floor.minimum", self.minimum, "a finite number")
        require(math.isfinite(self.factor), "Floor.factor", self.factor, "a finite number")

    def coefficients(self) -> tuple[float, ...]:
        """Return the factor and the minimum."""
        return (self.factor, self.minimum)

    @staticmethod
    def reference(x: torch.Tensor, operands: Operands) -> torch.Tensor:
        """Scale and raise the values. A NaN stays, because it is not below the minimum."""
        factor, minimum = operands.coefficients[:2]
        y = x * factor
        return y.masked_fill(y < minimum, minimum)

    @property
    def makes_negative(self) -> bool:
        """Whether the minimum is negative."""
        return self.minimum < 0.0

    @property
    def fills_zeros(self) -> bool:
        """Whether the minimum is above 0."""
        return self.minimum > 0.0

    @property
    def refusal(self) -> str:
        """The reason that a floor with a factor has no form; empty if the factor is 1."""
        return "" if self.factor == 1.0 else f"{self!r}: expected a floor without a factor"
