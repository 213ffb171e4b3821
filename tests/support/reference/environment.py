"""Environment variables, from the ``Environment:`` part of the docstrings of their readers."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..pool import ROOT
from .markdown import code, table, words

_PART = re.compile(r"^Environment:\n((?:    .*\n|\n)+)", re.MULTILINE)
_ENTRY = re.compile(r"^    ([A-Z][A-Z0-9_, ]+): ((?:.|\n(?!    [A-Z]))+)", re.MULTILINE)
_NAME = re.compile(r"[A-Z][A-Z0-9_]+")


@dataclass(frozen=True)
class Variable:
    """One line of an ``Environment:`` part.

    Args:
        names: Of the variables it is about.
        where: The file, from the repository's root.
        meaning: What is said.
    """

    names: tuple[str, ...]
    where: str
    meaning: str


def environment() -> str:
    """The table of variables: when each is read, and what it means.

    Raises:
        ValueError: A module reads a variable that its docstring does not name.
    """
    documented = list(variables())
    known = {(name, variable.where) for variable in documented for name in variable.names}
    if missing := sorted(read() - known):
        raise ValueError(f"read, and not in the docstring under Environment: {missing}")
    rows = [
        (
            ", ".join(map(code, variable.names)),
            "building" if variable.where == "setup.py" else "running",
            words(variable.meaning),
            code(variable.where),
        )
        for variable in sorted(documented, key=lambda v: (v.where == "setup.py", v.names))
    ]
    return table(("variable", "when", "meaning", "read by"), rows)


def variables() -> Iterator[Variable]:
    """What the docstrings say."""
    for path, tree in _sources():
        text = inspect.cleandoc(ast.get_docstring(tree) or "") + "\n"
        for part in _PART.findall(text):
            for names, meaning in _ENTRY.findall(part):
                said = re.sub(r"\s+", " ", meaning).strip()
                yield Variable(tuple(_NAME.findall(names)), path, said[:1].upper() + said[1:])


def read() -> set[tuple[str, str]]:
    """Name and file of every variable that is read by a name that is written down there."""
    found = set()
    for path, tree in _sources():
        constants = {
            node.targets[0].id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        }
        for node in ast.walk(tree):
            key = _key(node)
            if isinstance(key, ast.Name):
                key = ast.Constant(constants.get(key.id))
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                found.add((key.value, path))
    return found


def _key(node: ast.AST) -> ast.expr | None:
    """What ``os.environ`` is asked for."""
    if isinstance(node, ast.Subscript) and _is_environ(node.value):
        return node.slice
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
        function = node.func
        if _is_environ(function.value) or (
            function.attr == "getenv" and ast.unparse(function.value) == "os"
        ):
            return node.args[0]
    return None


def _is_environ(node: ast.expr) -> bool:
    return ast.unparse(node) == "os.environ"


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for path in [ROOT / "setup.py", *sorted((ROOT / "megatron_ext").rglob("*.py"))]:
        yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())
