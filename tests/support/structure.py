"""The package's modules and what they import, read from their source."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Module:
    """One module.

    Args:
        lines: Of its file.
        imports: The package's own modules that it imports, at any depth, also for type checkers.
        inside: Those of them that it imports inside of a function.
        foreign: Top-level names of other packages that it imports when it runs, at any depth.
    """

    lines: int
    imports: frozenset[str]
    inside: frozenset[str]
    foreign: frozenset[str]


@functools.cache
def read(package: Path) -> Mapping[str, Module]:
    """Dotted name below the package ("" for itself) -> its module."""
    files = {_name(path, package): path for path in sorted(package.rglob("*.py"))}
    return {name: _module(name, path, files, package.name) for name, path in files.items()}


def room(name: str) -> str:
    """The top-level package or module that a module is in."""
    return name.partition(".")[0]


def circles(imports: Mapping[str, frozenset[str]]) -> list[list[str]]:
    """Modules that import each other, in a circle of any length (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in imports.get(name, frozenset()):
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            circle = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for name in imports:
        if name not in order:
            visit(name)
    return sorted(found)


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _module(name: str, path: Path, files: Mapping[str, Path], package: str) -> Module:
    text = path.read_text()
    tree = ast.parse(text)
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
    inside = {id(x) for function in functions for x in ast.walk(function)}
    guards = (n for n in ast.walk(tree) if isinstance(n, ast.If))
    for_checkers = {
        id(x)
        for guard in guards
        if ast.unparse(guard.test) == "TYPE_CHECKING"
        for statement in guard.body
        for x in ast.walk(statement)
    }
    own: set[str] = set()
    own_inside: set[str] = set()
    foreign: set[str] = set()
    parts = name.split(".") if name else []
    here = parts if path.name == "__init__.py" else parts[:-1]
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
            found = [".".join([package, *filter(None, base), a.name]) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        for dotted in found:
            first, _, rest = dotted.partition(".")
            if first != package:
                foreign |= set() if id(node) in for_checkers else {first}
                continue
            target = rest if rest in files else rest.rpartition(".")[0]
            if target != name:
                own.add(target)
                own_inside |= {target} if id(node) in inside else set()
    return Module(len(text.splitlines()), frozenset(own), frozenset(own_inside), frozenset(foreign))
