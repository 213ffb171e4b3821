"""The rule that keeps the bias-corrected moments if betas or step change."""

from __future__ import annotations

from dataclasses import dataclass

from .base import Context, ElementRule, Rule
from .elementwise import KEEP, Scale
from .form import Form
from .registry import register


@register
@dataclass(frozen=True)
class BiasConsistent(Rule):
    r"""Keep the bias-corrected moment if betas or step change.

    .. math:: x' = x (1 - b'^{t'}) / (1 - b^t)

    The formula follows from Adam's definition (arXiv 1412.6980).
    """

    forms = (
        Form(
            "bias-consistent",
            "keeps the bias-corrected moment where betas or step change",
            r"x' = x \frac{1 - b'^{t'}}{1 - b^t}",
            "D",
        ),
    )
    keeps_bias = False
    reads_old = True

    def resolve(self, context: Context) -> ElementRule:
        """Return a scale by the ratio of the bias corrections."""
        t, after = context.saved_step, context.next_step
        if not t:
            return KEEP
        if not after:
            raise context.error(
                "with step 0 the bias-consistent moments are all 0. Keep step, give it a number, "
                "or reset the moments"
            )
        which = 0 if context.key == "exp_avg" else 1
        old, new = context.saved_betas()[which], context.next_betas()[which]
        factor = (1.0 - new**after) / (1.0 - old**t)
        return KEEP if factor == 1.0 else Scale(factor)
