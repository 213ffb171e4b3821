"""Presets and operations, from their registries."""

from __future__ import annotations

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from . import trees


class Presets(SphinxDirective):
    """The catalogue of presets."""

    def run(self) -> list[nodes.Node]:
        """How each is written, what it does, and its source."""
        from megatron_ext.presets import CATALOGUE

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
        from megatron_ext.operations import GRAMMAR

        rows = [([trees.code(form)], _moments(form), what) for form, what in GRAMMAR.items()]
        return [trees.table(("operation", "for", "what it does"), rows)]


def _mapping(name: str, arguments: tuple[str, ...]) -> str:
    if not arguments:
        return f"preset: {name}"
    numbers = ", ".join(f"{a.lower()}: {a}" for a in arguments)
    return f"preset: {{name: {name}, {numbers}}}"


def _moments(form: str) -> str:
    """The moments an operation has a meaning for, found by asking the check."""
    from megatron_ext.errors import PolicyError
    from megatron_ext.operations import check_moment, parse

    example = parse(form.split(" [")[0].translate(_NUMBERS))
    allowed = []
    for key in ("exp_avg", "exp_avg_sq"):
        try:
            check_moment(key, example, "")
        except PolicyError:
            continue
        allowed.append(key)
    return " and ".join(f"`{key}`" for key in allowed)


#: A number in place of each letter that stands for one.
_NUMBERS = str.maketrans({letter: "0.5" for letter in "AXPK"})
