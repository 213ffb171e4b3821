r"""Rules that set elements to 0 by magnitude or at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import PolicyError
from .base import Context, ElementRule, Operands, Rule, Statistic, require
from .elementwise import KEEP
from .form import Form
from .registry import register

if TYPE_CHECKING:
    import torch

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


@register
@dataclass(frozen=True)
class PruneMagnitude(ElementRule):
    r"""Set elements to zero whose magnitude is not above a threshold. A NaN stays NaN.

    .. math:: x' = x \text{ if } |x| > \theta \text{ else } 0

    Args:
        threshold: :math:`\theta \ge 0`. `resume.moments.magnitude_thresholds` computes
            quantiles for it.

    References:
        ReLoRA, arXiv 2307.05695.
    """

    threshold: float

    forms = ()
    keeps_bias = True
    reads_old = True
    name = "prune_magnitude"
    code = 4
    kind = "pointwise"
    coefficient_names = ("threshold",)

    def __post_init__(self) -> None:
        require(self.threshold >= 0.0, "PruneMagnitude.threshold", self.threshold, "at least 0")

    def coefficients(self) -> tuple[float, ...]:
        """Return the threshold."""
        return (self.threshold,)

    @staticmethod
    def reference(x: torch.Tensor, operands: Operands) -> torch.Tensor:
        """Prune the values. A NaN stays, because it is not at or below the threshold."""
        return x.masked_fill(x.abs() <= operands.coefficients[0], 0.0)


@register
@dataclass(frozen=True)
class Prune(Rule):
    """Set elements to zero that are not above the p-quantile of abs(x).

    The quantile is over the rows of one parameter that the rule covers.

    Args:
        fraction: p, from 0 to 1.

    References:
        ReLoRA, arXiv 2307.05695.
    """

    fraction: float

    forms = (
        Form(
            "prune P",
            "0 unless abs(x) is above the P-quantile of the parameter (ReLoRA)",
            r"x' = x \text{ if } \lvert x \rvert > Q_P(\lvert x \rvert) \text{ else } 0",
            "P 2307.05695 (ReLoRA)",
        ),
    )
    keeps_bias = True
    reads_old = True
    statistics = ("quantile",)

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction <= 1.0:
            raise PolicyError(f"prune: expected a fraction from 0 to 1, found {self.fraction!r}")

    def resolve(self, context: Context) -> ElementRule | Statistic:
        """Return the quantile of the rows that the checkpoint has. New rows are 0 already."""
        rows = context.own_rows()
        if not rows:
            return KEEP
        return Statistic(context.name, context.key, "quantile", rows, self.fraction)

    @staticmethod
    def of_statistic(value: float) -> ElementRule:
        """Return a pruning at the quantile."""
        return PruneMagnitude(value)


@register
@dataclass(frozen=True)
class PruneRandom(ElementRule):
    """Set elements to zero at random, independently of each other.

    The draw depends only on the seed, the parameter's name and the element's index in the unsharded
    parameter, so that every layout prunes the same elements. With equal seeds, exp_avg and
    exp_avg_sq of an element are pruned together.

    Args:
        probability: Probability that an element is set to zero, from 0 to 1.
        seed: Any integer.

    References:
        ReLoRA, arXiv 2307.05695 (random pruning in its code). The generator is splitmix64 (Steele,
        Lea and Flood, OOPSLA 2014).
    """

    probability: float
    seed: int = 0

    forms = (
        Form(
            "prune-random P [seed N]",
            "0 with probability P, by the element's global index",
            r"x' = 0 \text{ with probability } P",
            "P 2307.05695, its code",
        ),
    )
    keeps_bias = True
    reads_old = True
    name = "prune_random"
    code = 5
    kind = "positional"
    coefficient_names = ("probability",)

    def __post_init__(self) -> None:
        require(
            0.0 <= self.probability <= 1.0,
            "PruneRandom.probability",
            self.probability,
            "between 0 and 1",
        )

    def coefficients(self) -> tuple[float, ...]:
        """Return the probability, the only coefficient that the kernels do not round to fp32."""
        return (self.probability,)

    @staticmethod
    def reference(x: torch.Tensor, operands: Operands) -> torch.Tensor:
        """Prune the elements whose 53 random bits, as a fraction, are below the probability."""
        limit = round(operands.exact[0] * 2**53)
        return x.masked_fill(random_bits(operands.stream_key, operands.index()) < limit, 0.0)

    @classmethod
    def coefficient_refusal(cls, exact: Sequence[float]) -> str:
        """Refuse a probability outside [0, 1]."""
        if 0.0 <= exact[0] <= 1.0:
            return ""
        return f"a probability of {exact[0]:g} is not within 0 and 1"

    def stream_key(self, parameter: int) -> int:
        """Compute the key from the seed and the parameter's number."""
        return _signed(_mix(_mix(self.seed & _MASK) ^ (parameter & _MASK)))


def random_bits(key: int, index: torch.Tensor) -> torch.Tensor:
    """Compute 53 random bits for each global index, with splitmix64 as a counter-based generator.

    Args:
        key: The key of the stream, as a signed 64-bit number.
        index: The global indices, int64 of any shape.

    References:
        Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.
    """
    z = key + (index + 1) * _signed(_GOLDEN)
    z = (z ^ _shift(z, 30)) * _signed(_MIX_1)
    z = (z ^ _shift(z, 27)) * _signed(_MIX_2)
    return _shift(z ^ _shift(z, 31), 11)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Shift unsigned numbers to the right. The shift of torch's int64 is signed."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(z: int) -> int:
    """Convert an unsigned number to the signed one with the same bits, for torch's int64."""
    return z - (1 << 64) if z >> 63 else z


def _mix(z: int) -> int:
    """Compute one output of splitmix64 from a 64-bit state, in Python integers."""
    z = (z + _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * _MIX_1) & _MASK
    z = ((z ^ (z >> 27)) * _MIX_2) & _MASK
    return z ^ (z >> 31)
