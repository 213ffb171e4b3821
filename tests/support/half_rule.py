"""A moment rule that no module has: x' = x / 2."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.rules.base import ElementRule
from megatron_ext.rules.form import Form


def half(**missing: object) -> type:
    """A rule with everything that is needed, but for what is given otherwise; None: left out."""
    fields = {
        "forms": (Form("halve", "x' = x / 2", r"x' = x / 2", "D"),),
        "keeps_bias": True,
        "reads_old": True,
        "name": "halve",
        "code": 99,
        "kind": "pointwise",
        "coefficient_names": (),
        "coefficients": lambda self: (),
        "reference": staticmethod(lambda x, operands: x / 2),
        **missing,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    return dataclass(frozen=True)(type("Halve", (ElementRule,), given))
