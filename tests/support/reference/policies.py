"""Presets, operations and rules, from their registries."""

from __future__ import annotations

from megatron_ext.policy.presets import CATALOGUE
from megatron_ext.rules import registry

from .markdown import code, table, words


def presets() -> str:
    """How each preset is written, what it does, and its source."""
    rows = [
        (
            code(" ".join([name, *entry.arguments])),
            code(_mapping(name, entry.arguments)),
            words(entry.what),
            ", ".join(map(code, entry.declinable)) or "-",
            words(entry.source),
        )
        for name, entry in CATALOGUE.items()
    ]
    return table(("in a flag", "in a file", "what it does", "can be declined", "source"), rows)


def operations() -> str:
    """How each operation is written, for which moment, and what it does."""
    rows = [
        (code(text), " and ".join(map(code, form.moments)), words(form.what))
        for text, (_, form) in registry.forms().items()
    ]
    return table(("operation", "for", "what it does"), rows)


def formulas() -> str:
    """How each operation is written, its formula, and where that comes from."""
    rows = [
        (code(text), f"${form.formula}$", words(form.basis))
        for text, (_, form) in registry.forms().items()
    ]
    return table(("operation", "formula", "basis"), rows)


def rules() -> str:
    """The classes of all rules, as autodoc shows each in a build."""
    classes = [f".. autoclass:: {r.__module__}.{r.__qualname__}" for r in registry.rules()]
    return "\n".join(["```{eval-rst}", *classes, "```"])


def _mapping(name: str, arguments: tuple[str, ...]) -> str:
    if not arguments:
        return f"preset: {name}"
    numbers = ", ".join(f"{a.lower()}: {a}" for a in arguments)
    return f"preset: {{name: {name}, {numbers}}}"
