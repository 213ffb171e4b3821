"""The Python names that the page of autodoc shows, each with its first sentence."""

from __future__ import annotations

import ast
import re

import megatron_ext

from ..pool import ROOT
from .markdown import code, table, words

PAGE = ROOT / "docs" / "reference" / "api.md"
_MODULE = re.compile(r"^\.\. automodule:: (\S+)\n   :members:(.*)$", re.MULTILINE)


def names() -> str:
    """Read, not imported: Megatron is not needed."""
    rows = []
    for module, members in _MODULE.findall(PAGE.read_text()):
        for name in filter(None, re.split(r"[,\s]+", members)):
            rows.append((code(f"{module}.{name}"), words(_first_sentence(module, name))))
    public = [name for name in megatron_ext.__all__ if name != "__version__"]
    own = [(n, f"megatron_ext.{megatron_ext._WHERE[n]}") for n in public]
    first = [(code(f"megatron_ext.{n}"), words(_first_sentence(m, n))) for n, m in own]
    return table(("name", "what it is"), [*first, *rows])


def _first_sentence(module: str, name: str) -> str:
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    body = ast.parse(path.read_text()).body
    for node in body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            package = module.split(".")[: -node.level] if node.level else []
            return _first_sentence(".".join([*package, node.module or ""]), name)
    kinds = (ast.ClassDef, ast.FunctionDef)
    found = [node for node in body if isinstance(node, kinds) and node.name == name]
    if not found:
        raise ValueError(f"{path} does not define {name}")
    text = " ".join((ast.get_docstring(found[0]) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z])", text)[0]
