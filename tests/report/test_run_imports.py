"""What a run imports: neither matplotlib nor Jinja2, which only the page of a report needs."""

from __future__ import annotations

import ast
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import megatron_ext
from tests.support.refused import PAGE_PACKAGES

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "megatron_ext"

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / PACKAGE).rglob("*.py")
}
#: Commands of their own; no run imports them.
COMMANDS = tuple(f"{PACKAGE}.{name}" for name in ("cli", "demo", "__main__"))


def is_command(name: str) -> bool:
    return any(name == command or name.startswith(f"{command}.") for command in COMMANDS)


def imports_of(name: str) -> Iterator[str]:
    """What a module imports at any depth; a name in a module stands here as if it were one."""
    path = FILES[name]
    within = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = within[: len(within) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        for one in found:
            # The packages around a module are imported before it.
            yield from itertools.accumulate(one.split("."), "{}.{}".format)


def reached(graph: Mapping[str, set[str]], starts: set[str]) -> set[str]:
    """The modules that can be come to from some."""
    found: set[str] = set()
    waiting = list(starts)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph.get(name, ())
    return found


def test_no_module_of_a_run_comes_to_the_page_at_any_depth() -> None:
    graph = {name: set(imports_of(name)) for name in FILES}
    draws = {name for name, found in graph.items() if found & set(PAGE_PACKAGES)}
    assert len(draws) > 2
    entrances = {f"{PACKAGE}.{name}" for name in ("launch", *megatron_ext._WHERE.values())}
    assert entrances <= FILES.keys()
    run = reached(graph, entrances)
    assert {f"{PACKAGE}.report.files", f"{PACKAGE}.report.scalars"} < run
    assert run & draws == set()
    assert [name for name in run if is_command(name)] == []


def test_what_a_run_imports_does_without_what_makes_the_page() -> None:
    graph = {name: set(imports_of(name)) for name in FILES}
    draws = {name for name, found in graph.items() if found & set(PAGE_PACKAGES)}
    names = sorted(n for n in FILES if n not in draws and not is_command(n))
    code = (
        "import importlib, sys\n"
        "from tests.support.refused import refuse_page_packages\n"
        "refuse_page_packages()\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"print(*sorted({draws!r} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "MEGATRON_EXT_POLICY": "default"},  # megatron_ext.autoenable reads it
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""
