"""The layout of the package: who may import whom, and how large a module may be."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import megatron_ext
from tests.support.structure import Module, circles, read, room

PACKAGE = Path(megatron_ext.__file__).parent
MODULES = read(PACKAGE)

#: From the ground up: a package imports only those before it.
ORDER = (
    "errors",
    "version",
    "base",
    "rules",
    "_ops",
    "checkpoint",
    "policy",
    "host",
    "plan",
    "report",
    "resume",
    "offline",
    "hooks",
)
#: Above all others; they may import each other.
ENTRANCES = (
    "",
    "__main__",
    "api",
    "autoenable",
    "bridge",
    "cli",
    "cpu",
    "demo",
    "launch",
    "schemas",
)

#: Lists rather than code.
LISTS = ("cpu", "host.contract")
LONGEST = 300
MEDIAN = 130
ARROWS = 90

#: Module -> what it imports inside of a function, and why that does not hide a circle.
INSIDE = {
    # They import Megatron.
    "hooks.building": {"resume.layer_wise", "resume.optimizer", "resume.replicated"},
    "report.plots": {"report.figures"},  # it imports matplotlib
}


def rank_of(name: str) -> int:
    """Floor of a module: the entrances are the highest."""
    return len(ORDER) if room(name) in ENTRANCES else ORDER.index(room(name))


def upward(modules: dict[str, Module]) -> list[str]:
    """The imports that run up."""
    return [
        f"{name} -> {other}"
        for name, module in modules.items()
        for other in sorted(module.imports)
        if rank_of(other) > rank_of(name)
    ]


def test_every_module_has_its_place() -> None:
    assert len(MODULES) > 100
    assert {room(name) for name in MODULES} == {*ORDER, *ENTRANCES}


def test_no_import_runs_up() -> None:
    assert upward(MODULES) == []


def test_the_look_for_upward_imports_can_fail() -> None:
    wrong = MODULES | {
        "base.text": Module(1, frozenset({"hooks.session"}), frozenset(), frozenset())
    }
    assert upward(wrong) == ["base.text -> hooks.session"]


def test_there_is_no_circle() -> None:
    assert circles({name: module.imports for name, module in MODULES.items()}) == []


def test_the_look_for_circles_can_fail() -> None:
    imports = {"a": frozenset("b"), "b": frozenset("c"), "c": frozenset("a"), "d": frozenset("a")}
    assert circles(imports) == [["a", "b", "c"]]


def test_imports_inside_a_function_are_for_what_is_optional() -> None:
    found = {
        name: set(module.inside)
        for name, module in MODULES.items()
        if module.inside and room(name) not in ENTRANCES
    }
    assert found == INSIDE


def test_packages_lean_on_few_others() -> None:
    arrows = {
        (room(name), room(other))
        for name, module in MODULES.items()
        for other in module.imports
        if room(name) != room(other)
    }
    assert 50 < len(arrows) <= ARROWS


def test_a_module_fits_a_readers_head() -> None:
    sizes = {name: module.lines for name, module in MODULES.items()}
    assert {name for name, lines in sizes.items() if lines > LONGEST} <= set(LISTS)
    assert statistics.median(sizes.values()) <= MEDIAN


def changing_globals(source: str) -> Iterator[str]:
    """The names that functions of a module rebind in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Global):
            yield from node.names


def test_no_function_rebinds_a_global_of_its_module() -> None:
    found = {
        name: names
        for path in sorted(PACKAGE.rglob("*.py"))
        if (names := list(changing_globals(path.read_text())))
        for name in [str(path.relative_to(PACKAGE))]
    }
    assert found == {}


def test_the_tests_lie_in_the_folders_of_the_package() -> None:
    folders = {p.parent.name for p in Path(__file__).parents[1].rglob("test_*.py")}
    assert folders - {room(name) for name in MODULES} == {"project", "benchmarks", "te"}
