"""Formulas as MathML, which browsers show without a script: docutils' own conversion."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging


def inline(translator: Any, node: nodes.math) -> None:
    """A formula in a line."""
    translator.body.append(_converted(node, node.astext(), block=False))
    raise nodes.SkipNode


def block(translator: Any, node: nodes.math_block) -> None:
    """A formula, or several that blank lines part, by themselves."""
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    for formula in node.astext().split("\n\n"):
        if formula.strip():
            translator.body.append(_converted(node, formula.strip(), block=True))
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def _converted(node: nodes.Element, formula: str, *, block: bool) -> str:
    try:
        return tex2mathml(formula, as_block=block)
    except MathError as e:
        logging.getLogger(__name__).warning("%s in: %s", e, formula, location=node)
        return ""
