"""Presets and operations, from their registries."""

from __future__ import annotations

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from . import trees


class Presets(SphinxDirective):
    """The catalogue of presets."""

    def run(self) -> list[nodes.Node]:
        """How each is written, what it does, and its source."""
        from megatron_ext.policy.presets import CATALOGUE

        rows = [
            (
                [trees.code(" ".join([name, *entry.arguments]))],
                [trees.code(_mapping(name, entry.arguments))],
                entry.what,
                ", ".join(f"`{part}`" for part in entry.declinable) or "-",
                entry.source,
            )
            for name, entry in CATALOGUE.items()
        ]
        head = ("in a flag", "in a file", "what it does", "can be declined", "source")
        return [trees.table(head, rows)]


class Operations(SphinxDirective):
    """The grammar of operations."""

    def run(self) -> list[nodes.Node]:
        """How each is written, for which moment, and what it does."""
        from megatron_ext.rules import registry

        rows = [
            (
                [trees.code(text)],
                " and ".join(f"`{key}`" for key in form.moments),
                form.what,
            )
            for text, (_, form) in registry.forms().items()
        ]
        return [trees.table(("operation", "for", "what it does"), rows)]


class Formulas(SphinxDirective):
    """The formula of each operation."""

    def run(self) -> list[nodes.Node]:
        """How each is written, its formula, and where that comes from."""
        from megatron_ext.rules import registry

        rows = [
            ([trees.code(text)], [nodes.math(form.formula, form.formula)], form.basis)
            for text, (_, form) in registry.forms().items()
        ]
        return [trees.table(("operation", "formula", "basis"), rows)]


class Rules(SphinxDirective):
    """The classes of all rules."""

    def run(self) -> list[nodes.Node]:
        """As autodoc shows each; in a part that is reStructuredText."""
        from megatron_ext.rules import registry

        classes = (f".. autoclass:: {r.__module__}.{r.__qualname__}\n" for r in registry.rules())
        return self.parse_text_to_nodes("\n".join(classes))


def _mapping(name: str, arguments: tuple[str, ...]) -> str:
    if not arguments:
        return f"preset: {name}"
    numbers = ", ".join(f"{a.lower()}: {a}" for a in arguments)
    return f"preset: {{name: {name}, {numbers}}}"
