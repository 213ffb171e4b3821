"""A class or function as it stands in a file."""

from __future__ import annotations

import ast

from ..pool import ROOT


def listing(file: str, name: str) -> str:
    """Its lines, with the decorators."""
    text = (ROOT / file).read_text()
    kinds = (ast.ClassDef, ast.FunctionDef)
    (found,) = (n for n in ast.parse(text).body if isinstance(n, kinds) and n.name == name)
    first = min([found.lineno, *(d.lineno for d in found.decorator_list)])
    lines = text.splitlines()[first - 1 : found.end_lineno]
    return "\n".join(["```python", *lines, "```"])
