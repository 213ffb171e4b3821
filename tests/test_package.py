"""The package as a whole: cheap imports, public names, one version, tests that test."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.version import Version

import megatron_ext
from megatron_ext.version import __version__
from tests.support.pool import RankPool

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_ext"

#: What decides. It runs without a GPU, without ranks and without importing torch or Megatron.
PURE = (
    "errors",
    "rules",
    "presets",
    "policy",
    "layout",
    "files",
    "bucket_layout",
    "checkpoint",
    "phase",
    "counters",
    "cautions",
    "plan",
    "moment_plan",
    "merge",
)
HEAVY = ("torch", "megatron", "numpy", "transformer_engine", "apex")


def heavy_modules_after(statement: str) -> list[str]:
    """Which of the heavy packages a new interpreter has after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_the_package_imports_neither_torch_nor_megatron() -> None:
    assert heavy_modules_after("import megatron_ext; dir(megatron_ext)") == []


def test_planning_and_merging_import_neither_torch_nor_megatron() -> None:
    modules = ", ".join(f"megatron_ext.{name}" for name in PURE)
    used = "from megatron_ext import ResumePolicy, PlanError; ResumePolicy(('eps',))"
    assert heavy_modules_after(f"import {modules}; {used}") == []


def test_the_check_for_heavy_modules_can_fail() -> None:
    assert heavy_modules_after("import numpy") == ["numpy"]


def imports_of(path: Path) -> Iterator[str]:
    """Every module a file imports when it runs, at any depth; this package's begin with a dot."""
    tree = ast.parse(path.read_text())
    for_checkers = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def pure_files() -> dict[str, Path]:
    """Name of each module that decides -> its file."""
    found = {}
    for name in PURE:
        path = PACKAGE / name
        files = path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]
        found |= {str(f.relative_to(PACKAGE).with_suffix("")): f for f in files}
    return found


@pytest.mark.parametrize("name", pure_files())
def test_what_decides_does_not_import_torch_inside_a_function_either(name: str) -> None:
    found = set(imports_of(pure_files()[name]))
    inside = {f".{module.rpartition('/')[2]}" for module in pure_files() if "/" in module}
    dots = "." * (name.count("/") + 1)
    allowed = {f"{dots}{other}" for other in PURE} | (inside | {"."} if "/" in name else set())
    foreign = {m for m in found if m.split(".")[0] not in sys.stdlib_module_names} - allowed
    assert foreign == set()


def test_the_public_names_are_those_that_can_be_loaded() -> None:
    assert megatron_ext.__all__ == sorted(megatron_ext.__all__)
    assert set(megatron_ext._WHERE) == set(megatron_ext.__all__) - {"__version__"}
    assert dir(megatron_ext) == megatron_ext.__all__


def test_type_checkers_are_told_the_same_names_and_places() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == megatron_ext._WHERE


@pytest.mark.ranks
def test_every_public_name_resolves(ext: RankPool) -> None:
    (found,) = ext.run("tests.support.package_cases:public_names", 1)
    places = {name: f"megatron_ext.{module}" for name, module in megatron_ext._WHERE.items()}
    assert {name: module for name, (_, module) in found.items() if name in places} == places
    assert set(found) == set(megatron_ext.__all__)
    functions = {name for name, (kind, _) in found.items() if kind == "function"}
    assert functions == {"add_arguments", "get_megatron_optimizer", "transform_moments"}


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="module 'megatron_ext' has no attribute 'Adam'"):
        _ = megatron_ext.Adam


def test_every_error_of_the_package_has_one_base_and_says_what_it_is_for() -> None:
    from megatron_ext import errors

    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    assert len(classes) == 7
    for cls in classes:
        assert issubclass(cls, errors.MegatronExtError)
        assert cls.__doc__
        assert cls.__name__ in megatron_ext.__all__


def test_there_is_one_version() -> None:
    assert megatron_ext.__version__ == __version__
    assert str(Version(__version__)) == __version__
    project = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "megatron_ext.version.__version__" }' in project
    written = re.compile(rf"[\"']{re.escape(__version__)}[\"']")
    places = [p.name for p in PACKAGE.rglob("*.py") if written.search(p.read_text())]
    assert places == ["version.py"]


def test_the_package_says_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


# --- the tests themselves


def says_something(test: ast.AST) -> bool:
    """Whether a test asserts, expects an error, or calls a helper that asserts."""
    for node in ast.walk(test):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = node.func
            name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
            if name in ("raises", "warns", "fail") or name.startswith("assert_"):
                return True
    return False


def test_no_test_is_without_an_assertion() -> None:
    found = {
        f"{path.name}::{node.name}": says_something(node)
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert len(found) > 100
    assert [name for name, asserts in found.items() if not asserts] == []


def test_the_check_for_assertions_can_fail() -> None:
    assert not says_something(ast.parse("def test_x():\n    run()\n    check = 1"))
    assert says_something(ast.parse("def test_x():\n    np.testing.assert_array_equal(1, 1)"))
