r"""What a moment rule is: its forms, what it becomes for a checkpoint, and its arithmetic.

No torch is needed to import a rule, because a policy is read without it: the references use the
operators and methods of the tensors they are given, and torch is imported for type checkers only.

Notation: m = exp_avg, v = exp_avg_sq (the raw moving averages), t = step, b1 and b2 = betas,
primes mark the new phase.
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
StatisticKind = Literal[RowStatistic, "quantile"]
Spans = tuple[tuple[int, int], ...]

#: How the kernels go through the elements of a rule: they leave them alone; one value at a time;
#: with the element's global index; with exp_avg beside exp_avg_sq, which such a rule is for.
Kind = Literal["kept", "pointwise", "positional", "joint"]


@dataclass(frozen=True, order=True)
class Statistic:
    """A number about one moment of one unsharded parameter, before anything is changed.

    Args:
        parameter: Its name.
        key: Which moment.
        kind: ``mean``, ``median`` or ``column-mean``; ``quantile``: of abs(x).
        rows: First row and one past the last of each range that is looked at.
        fraction: p of the quantile.
        factor: The statistic is multiplied by it: what those rows are multiplied by.
    """

    parameter: str
    key: Key
    kind: StatisticKind
    rows: Spans
    fraction: float = 0.0
    factor: float = 1.0

    # What a rule says of itself, said of one that is not known yet.
    reads_old: ClassVar[bool] = True
    multiplier: ClassVar[None] = None


class Context(Protocol):
    """What a rule may ask about the checkpoint and the plan, for one moment of one parameter."""

    @property
    def key(self) -> Key:
        """Which moment."""

    @property
    def name(self) -> str:
        """The parameter's name."""

    @property
    def saved_step(self) -> int | None:
        """T of the moments, where the checkpoint has one."""

    @property
    def next_step(self) -> int | None:
        """T after the resume."""

    def step(self) -> int:
        """T of the moments; raises PlanError where it is 0 or unknown."""

    def saved_betas(self) -> tuple[float, float]:
        """b1 and b2 with which the moments were made; raises PlanError where unknown."""

    def next_betas(self) -> tuple[float, float]:
        """b1 and b2 after the resume; raises PlanError where there are none."""

    def own_rows(self) -> Spans:
        """The rows that the rule is for and the checkpoint has."""

    def kept_rows(self, text: str) -> tuple[Spans, float]:
        """The rows that are kept or scaled, and their factor; raises PlanError without any."""

    def error(self, text: str) -> PlanError:
        """An error that names the rule and the parameter."""


class Operands(Protocol):
    """What the reference of a rule may ask of a segment."""

    @property
    def exp_avg(self) -> torch.Tensor:
        """exp_avg of the same elements, fp32, for a joint rule."""

    @property
    def coefficients(self) -> Sequence[float]:
        """The rule's coefficients, rounded to fp32."""

    @property
    def exact(self) -> Sequence[float]:
        """The same in float64."""

    @property
    def stream_key(self) -> int:
        """As `ElementRule.stream_key` gave it."""

    def index(self) -> torch.Tensor:
        """The elements' int64 indices in the unsharded parameter, for a positional rule."""


class Rule:
    """A rule for moments; a frozen dataclass with `megatron_ext.rules.registry.register` above it.

    Attributes:
        forms: How a policy writes it; empty for an element rule that only other rules become.
        keeps_bias: Whether it leaves the moment with the bias towards 0 that it has, so that Adam's
            bias correction for the old step still fits.
        reads_old: Whether the result depends on the old values of the moments.
        statistics: The kinds of `Statistic` that `resolve` returns.
    """

    forms: ClassVar[tuple[Form, ...]]
    keeps_bias: ClassVar[bool]
    reads_old: ClassVar[bool]
    statistics: ClassVar[tuple[StatisticKind, ...]] = ()

    def resolve(self, context: Context) -> ElementRule | Statistic:
        """What is done to one element, with what only the checkpoint knows.

        Args:
            context: One moment of one parameter.

        Returns:
            An element rule, or the statistic that `of_statistic` makes one from.

        Raises:
            PlanError: The checkpoint does not have what the rule needs.
        """
        raise NotImplementedError

    @staticmethod
    def of_statistic(value: float) -> ElementRule:
        """The element rule for a statistic of one of the kinds in `statistics`."""
        raise NotImplementedError

    @property
    def form(self) -> Form:
        """How this one is written.

        Raises:
            PolicyError: It cannot be written.
        """
        values = tuple(getattr(self, f.name) for f in fields(self))  # type: ignore[arg-type]
        for form in self.forms:
            if values[: len(form.values)] == form.values:
                return form
        raise PolicyError(f"{self!r} has no form in which a policy can ask for it")

    @property
    def makes_negative(self) -> bool:
        """Whether it makes some numbers of at least 0 negative, which exp_avg_sq must not be."""
        return False

    @property
    def refusal(self) -> str:
        """Why no policy can ask for it as it is; empty if it can."""
        return ""


class ElementRule(Rule):
    """A rule that the fused op applies, one element by itself.

    Attributes:
        name: As in the list of ``csrc/element_rule.h``.
        code: Its number there and in the segment table.
        kind: How the kernels go through it.
        coefficient_names: What each of `coefficients` is.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    kind: ClassVar[Kind]
    coefficient_names: ClassVar[tuple[str, ...]]

    def resolve(self, context: Context) -> ElementRule | Statistic:
        """Itself: nothing of the checkpoint is needed."""
        return self

    def coefficients(self) -> tuple[float, ...]:
        """The numbers that the kernels work with."""
        raise NotImplementedError

    @staticmethod
    def reference(x: torch.Tensor, operands: Operands) -> torch.Tensor:
        """The rule's arithmetic, written down once: what the kernels repeat bit for bit.

        Args:
            x: The moment's old values, fp32; not changed.
            operands: What else it needs.

        Returns:
            The new values, fp32, every operation rounded by itself.
        """
        raise NotImplementedError

    @classmethod
    def coefficient_refusal(cls, exact: Sequence[float]) -> str:
        """What is wrong with coefficients that a caller of the op has put into the table."""
        return ""

    def stream_key(self, parameter: int) -> int:
        """Key of the rule's random stream for a parameter, signed 64 bits; 0: it has none."""
        return 0

    @property
    def multiplier(self) -> float | None:
        """The one number that every element is multiplied by; None if it is not that."""
        return None

    @property
    def fills_zeros(self) -> bool:
        """Whether it decides what an element of 0 becomes, as the moments of a new row are."""
        return False


def require(condition: bool, name: str, found: object, expected: str) -> None:
    """Raise PolicyError where a rule is given a number that makes no sense."""
    if not condition:
        raise PolicyError(f"{name} is {found!r}; it must be {expected}")
