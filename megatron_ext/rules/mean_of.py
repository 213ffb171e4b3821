"""The rule that fills a parameter with the mean of other parameters."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..base.patterns import compiled
from ..base.regex_parser import PatternError
from ..errors import PolicyError
from .base import Context, ElementRule, Rule, Statistic
from .elementwise import Fill
from .form import Form
from .registry import register


@register
@dataclass(frozen=True)
class MeanOf(Rule):
    """Set to the mean of the same moment over all elements of the parameters that match a pattern.

    The values are those of the checkpoint. Scaled parameters count with their new values. A
    parameter that is new to the optimizer, or that another rule changes, cannot be among them.

    Args:
        pattern: A glob over the global names, or a regular expression after ``re:``.
    """

    pattern: str

    forms = (
        Form(
            "fill mean-of PATTERN",
            "the mean of all parameters whose name matches PATTERN",
            r"x' = \mathrm{mean}(x_\mathrm{PATTERN})",
            "D",
        ),
    )
    keeps_bias = False
    reads_old = False
    statistics = ("mean-of",)

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not re.fullmatch(r"\S+", self.pattern):
            raise PolicyError(
                "fill mean-of: expected a glob, or re: and a regular expression, without spaces; "
                f"found {self.pattern!r}"
            )
        try:
            compiled(self.pattern)
        except PatternError as e:
            raise PolicyError(f"fill mean-of {self.pattern}: {e}") from None

    def resolve(self, context: Context) -> Statistic:
        """Return the mean; its parameters may be on other ranks, so they are found later."""
        return Statistic(self.pattern, context.key, "mean-of", ())

    @staticmethod
    def of_statistic(value: float) -> ElementRule:
        """Return a fill with the value."""
        return Fill(value)
