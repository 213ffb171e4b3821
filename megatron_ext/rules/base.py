r"""Base classes of moment rules: forms, resolution for a checkpoint, and arithmetic.

Importing a rule does not import torch, because a policy is read without it. The references use only
operators and methods of their tensors, and torch is imported only for type checkers.

Notation: m = exp_avg and v = exp_avg_sq (the raw moving averages), t = step, b1 and b2 = betas.
Primes mark the new phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from ..errors import PlanError, PolicyError
from .form import Form, Key

if TYPE_CHECKING:
    import torch

RowStatistic = Literal["mean", "median", "column-mean"]
StatisticKind = Literal[RowStatistic, "mean-of", "quantile"]
Spans = tuple[tuple[int, int], ...]

#: The smallest number that rounds to infinity in fp32. The kernels round coefficients to fp32.
_FP32_OVERFLOW = 2.0**128 - 2.0**103

#: How the kernels apply a rule. ``kept`` changes no element. ``pointwise`` needs only the element's
#: value, and ``positional`` its global index too. ``joint`` is for exp_avg_sq and reads exp_avg.
Kind = Literal["kept", "pointwise", "positional", "joint"]


@dataclass(frozen=True, order=True)
class Statistic:
    """A statistic of one moment of one unsharded parameter or of several, before any change.

    Args:
        parameter: The parameter's name; for ``mean-of`` the pattern of the parameters' names.
        key: The moment.
        kind: ``mean``, ``median``, ``column-mean``, ``mean-of``, which is over all elements of
            several parameters, or ``quantile``, which is of abs(x).
        rows: First row and one past the last of each range that the statistic covers. Empty for
            ``mean-of``: `megatron_ext.plan.mean_of` finds its parameters and their rows.
        fraction: p of the quantile.
        factor: The factor by which the rows are scaled. The statistic is multiplied by it.
    """

    parameter: str
    key: Key
    kind: StatisticKind
    rows: Spans
    fraction: float = 0.0
    factor: float = 1.0

    # The attributes of a rule hold for the rule that the statistic will become.
    multiplier: ClassVar[None] = None

    @property
    def reads_old(self) -> bool:
        """Whether the result depends on old values of the parameter that has the rule."""
        return self.kind != "mean-of"


class Context(Protocol):
    """Values of the checkpoint and the plan for a rule, for one moment of one parameter."""

    @property
    def key(self) -> Key:
        """The moment."""

    @property
    def name(self) -> str:
        """The parameter's name."""

    @property
    def saved_step(self) -> int | None:
        """Step t of the saved moments; None if the checkpoint has none."""

    @property
    def next_step(self) -> int | None:
        """Step t after the resume."""

    def step(self) -> int:
        """Return step t of the saved moments. Raises PlanError if it is 0 or unknown."""

    def saved_betas(self) -> tuple[float, float]:
        """Return b1 and b2 of the saved moments. Raises PlanError if they are unknown."""

    def next_betas(self) -> tuple[float, float]:
        """Return b1 and b2 after the resume. Raises PlanError if there are none."""

    def own_rows(self) -> Spans:
        """Return the rows that the rule covers and the checkpoint has."""

    def kept_rows(self, text: str) -> tuple[Spans, float]:
        """Return the rows that are kept or scaled, and their factor. Raises PlanError if none."""

    def error(self, text: str) -> PlanError:
        """Make an error that names the rule and the parameter."""


class Operands(Protocol):
    """Values of a segment for the reference of a rule."""

    @property
    def exp_avg(self) -> torch.Tensor:
        """The old exp_avg of the same elements, fp32, for a joint rule."""

    @property
    def coefficients(self) -> Sequence[float]:
        """The rule's coefficients, rounded to fp32."""

    @property
    def exact(self) -> Sequence[float]:
        """The rule's coefficients in float64."""

    @property
    def stream_key(self) -> int:
        """The result of `ElementRule.stream_key`."""

    def index(self) -> torch.Tensor:
        """Compute the elements' int64 indices in the unsharded parameter, for a positional rule."""


class Rule:
    """A moment rule: a frozen dataclass that `megatron_ext.rules.registry.register` decorates.

    Attributes:
        forms: The forms in which a policy writes it. Empty for an element rule that only other
            rules resolve to.
        keeps_bias: Whether the moment keeps its bias towards 0, so that Adam's bias correction for
            the old step is still valid.
        reads_old: Whether the result depends on the old values of the moments.
        statistics: The kinds of `Statistic` that `resolve` returns.
    """

    forms: ClassVar[tuple[Form, ...]]
    keeps_bias: ClassVar[bool]
    reads_old: ClassVar[bool]
    statistics: ClassVar[tuple[StatisticKind, ...]] = ()

    def resolve(self, context: Context) -> ElementRule | Statistic:
        """Resolve the rule to an element rule, with values from the checkpoint.

        Args:
            context: The values for one moment of one parameter.

        Returns:
            An element rule, or the statistic from which `of_statistic` makes one.

        Raises:
            PlanError: The checkpoint lacks a value that the rule needs.
        """
        raise NotImplementedError

    @staticmethod
    def of_statistic(value: float) -> ElementRule:
        """Make the element rule from the value of a statistic of a kind in `statistics`."""
        raise NotImplementedError

    @property
    def form(self) -> Form:
        """The form in which this rule is written.

        Raises:
            PolicyError: The rule has no such form.
        """
        values = tuple(getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        for form in self.forms:
            if values[: len(form.values)] == form.values:
                return form
        raise PolicyError(f"{self!r} has no form in which a policy can ask for it")

    @property
    def makes_negative(self) -> bool:
        """Whether it can make a value of at least 0 negative, which exp_avg_sq must not be."""
        return False

    @property
    def refusal(self) -> str:
        """The reason why a policy cannot request the rule with these values; empty if it can."""
        return ""


class ElementRule(Rule):
    """A rule that the fused op applies to each element.

    Attributes:
        name: Its name in the list of ``csrc/element_rule.h``.
        code: Its number in that list and in the segment table.
        kind: How the kernels apply it.
        coefficient_names: The name of each of `coefficients`.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    kind: ClassVar[Kind]
    coefficient_names: ClassVar[tuple[str, ...]]

    def resolve(self, context: Context) -> ElementRule | Statistic:
        """Return the rule itself, because it needs no value from the checkpoint."""
        return self

    def coefficients(self) -> tuple[float, ...]:
        """Return the coefficients that the kernels use."""
        raise NotImplementedError

    @staticmethod
    def reference(x: torch.Tensor, operands: Operands) -> torch.Tensor:
        """Apply the rule in plain torch. The kernels give the same bits.

        Args:
            x: The moment's old values, fp32. They are not modified.
            operands: Other values of the segment.

        Returns:
            The new values, fp32. Every operation is rounded separately.
        """
        raise NotImplementedError

    @classmethod
    def coefficient_refusal(cls, exact: Sequence[float]) -> str:
        """Describe invalid coefficients in a caller's segment table; empty if they are valid."""
        return ""

    @property
    def overflow(self) -> str:
        """The reason why the kernels cannot apply the rule; empty if fp32 holds its numbers."""
        for name, value in zip(self.coefficient_names, self.coefficients(), strict=False):
            if not abs(value) < _FP32_OVERFLOW:
                return f"{name} is {value!r}, which fp32 cannot hold (at most 3.4028235e+38)"
        return ""

    def stream_key(self, parameter: int) -> int:
        """Return the key of a parameter's random stream, signed 64 bits; 0 without a stream."""
        return 0

    @property
    def multiplier(self) -> float | None:
        """The factor, if the rule multiplies every element by one factor; else None."""
        return None

    @property
    def fills_zeros(self) -> bool:
        """Whether the policy decides the value of an element that was 0, as in new rows."""
        return False


def require(condition: bool, name: str, found: object, expected: str) -> None:
    """Raise PolicyError if a value of a rule is invalid."""
    if not condition:
        raise PolicyError(f"{name} is {found!r}; it must be {expected}")
