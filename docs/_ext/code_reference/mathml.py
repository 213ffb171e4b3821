"""Formulas as MathML, which browsers show without a script: docutils' own conversion."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml


def inline(translator: Any, node: nodes.math) -> None:
    """A formula in a line."""
    translator.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def block(translator: Any, node: nodes.math_block) -> None:
    """A formula, or several that blank lines part, by themselves."""
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    for formula in node.astext().split("\n\n"):
        if formula.strip():
            translator.body.append(tex2mathml(formula.strip(), as_block=True))
    translator.body.append("</div>\n")
    raise nodes.SkipNode
