r"""Element rules: what can be done to one element of exp_avg or exp_avg_sq.

Plain data, no torch. A rule is applied by `megatron_ext.moments`; its arithmetic is written down
once, in `megatron_ext._ops.reference`, and repeated bit for bit by the kernels of ``csrc/``.

Notation: m = exp_avg, v = exp_avg_sq (the raw moving averages), t = step, b1 and b2 = betas,
primes mark the new phase.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import PolicyError


@dataclass(frozen=True)
class Keep:
    """The element stays as it is."""


#: The one `Keep` there is need for.
KEEP = Keep()


@dataclass(frozen=True)
class Scale:
    r"""Multiply by a factor.

    .. math:: x' = a x

    Args:
        factor: a, finite.
    """

    factor: float

    def __post_init__(self) -> None:
        _require(math.isfinite(self.factor), "Scale.factor", self.factor, "a finite number")


@dataclass(frozen=True)
class Fill:
    """Set to a constant; 0 is a reset. The old value is not read.

    Args:
        value: Finite; in the units of the moment.
    """

    value: float = 0.0

    def __post_init__(self) -> None:
        _require(math.isfinite(self.value), "Fill.value", self.value, "a finite number")


@dataclass(frozen=True)
class Floor:
    r"""Raise to a least value, after scaling: guards the division by sqrt(v).

    .. math:: x' = \max(a x, f)

    Args:
        minimum: f, finite.
        factor: a, finite.
    """

    minimum: float
    factor: float = 1.0

    def __post_init__(self) -> None:
        _require(math.isfinite(self.minimum), "Floor.minimum", self.minimum, "a finite number")
        _require(math.isfinite(self.factor), "Floor.factor", self.factor, "a finite number")


@dataclass(frozen=True)
class PruneMagnitude:
    r"""Set to zero what is not above a threshold in magnitude; NaN stays.

    .. math:: x' = x \text{ if } |x| > \theta \text{ else } 0

    Args:
        threshold: :math:`\theta \ge 0`; `megatron_ext.moments.magnitude_thresholds` finds the
            p-quantile.

    References:
        ReLoRA, arXiv 2307.05695.
    """

    threshold: float

    def __post_init__(self) -> None:
        _require(self.threshold >= 0.0, "PruneMagnitude.threshold", self.threshold, "at least 0")


@dataclass(frozen=True)
class PruneRandom:
    """Set elements to zero at random, each by itself.

    The draw depends on the seed, the parameter's name and the element's index in the unsharded
    parameter, and on nothing else: the same elements go on every layout. exp_avg and exp_avg_sq of
    an element go together when they have the same seed.

    Args:
        probability: Of an element to be set to zero, from 0 to 1.
        seed: Any integer.

    References:
        ReLoRA, arXiv 2307.05695 (its code's random pruning). The generator: splitmix64, Steele,
        Lea and Flood, OOPSLA 2014.
    """

    probability: float
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            0.0 <= self.probability <= 1.0,
            "PruneRandom.probability",
            self.probability,
            "between 0 and 1",
        )


@dataclass(frozen=True)
class BatchSize:
    r"""exp_avg_sq after the batch size was multiplied by k; experimental. exp_avg is kept.

    v estimates the squared gradient plus its variance, and only the variance shrinks with the
    batch. The mean of m over its window tells the two apart:

    .. math::

        \hat m = m / (1 - b_1^t), \quad \hat v = v / (1 - b_2^t), \quad c = (1 - b_1) / (1 + b_1)

        g^2 = \operatorname{clip}\left((\hat m^2 - c \hat v) / (1 - c),\; 0,\; \hat v\right)

        v' = (1 - b_2^t) \left(g^2 + (\hat v - g^2) / k\right)

    Its bias grows with k: at a signal-to-noise ratio of 0 about -2% at k = 1/4, +8% at 4, +39% at
    16.

    Args:
        ratio: k = new batch size / old batch size, > 0.
        betas: b1 and b2 with which the moments were made; b1 in (0, 1), b2 in [0, 1).
        step: t of the moments, at least 1.
    """

    ratio: float
    betas: tuple[float, float]
    step: int

    def __post_init__(self) -> None:
        ok = math.isfinite(self.ratio) and self.ratio > 0.0
        _require(ok, "BatchSize.ratio", self.ratio, "a finite number above 0")
        ok = len(self.betas) == 2 and 0.0 < self.betas[0] < 1.0 and 0.0 <= self.betas[1] < 1.0
        _require(ok, "BatchSize.betas", self.betas, "two numbers, in (0, 1) and [0, 1)")
        _require(self.step >= 1, "BatchSize.step", self.step, "at least 1")


#: A rule that looks at one moment by itself.
MomentRule = Keep | Scale | Fill | Floor | PruneMagnitude | PruneRandom
#: What can be done to exp_avg_sq; `BatchSize` needs `Keep` for exp_avg.
SecondMomentRule = MomentRule | BatchSize


def _require(condition: bool, name: str, found: object, expected: str) -> None:
    if not condition:
        raise PolicyError(f"{name} is {found!r}; it must be {expected}")
