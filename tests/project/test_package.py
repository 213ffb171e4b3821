"""The package as a whole: cheap imports, public names, one version, tests that test."""

from __future__ import annotations

import ast
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.version import Version

import megatron_ext
from megatron_ext import cli
from megatron_ext.host.contract import TESTED
from megatron_ext.version import __version__
from tests.support import structure
from tests.support.pool import RankPool

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_ext"

#: What decides. It runs without a GPU, without ranks and without importing torch or Megatron.
PURE = (
    "errors",
    "base.text",
    "base.files",
    "base.patterns",
    "base.regex",
    "base.regex_parser",
    "base.values",
    "base.schema",
    "base.placement",
    "rules",
    "checkpoint.state",
    "policy",
    "host.optimizers",
    "plan.decisions",
    "plan.fitting",
    "plan.groups",
    "plan.hyperparameters",
    "plan.cautions",
    "plan.parameters",
    "plan.matching",
    "plan.mean_of",
    "plan.moments",
    "plan.resized",
    "resume.merge",
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
    modules = ", ".join(f"megatron_ext.{name}" for name in pure_modules())
    used = "from megatron_ext import ResumePolicy, PlanError; ResumePolicy(('eps',))"
    assert heavy_modules_after(f"import {modules}; {used}") == []


def test_the_check_for_heavy_modules_can_fail() -> None:
    assert heavy_modules_after("import numpy") == ["numpy"]


def pure_modules() -> list[str]:
    """The modules that decide; of a package all of its modules."""
    found = []
    for name in PURE:
        path = PACKAGE.joinpath(*name.split("."))
        inside = sorted(p.stem for p in path.glob("[!_]*.py"))
        found += [f"{name}.{module}" for module in inside] or [name]
    return found


@pytest.mark.parametrize("name", pure_modules())
def test_what_decides_does_not_import_torch_inside_a_function_either(name: str) -> None:
    modules = structure.read(PACKAGE)
    inside = {m for m in modules[name].imports if m in modules}
    pure = {*pure_modules(), *(".".join(m.split(".")[:-1]) for m in pure_modules()), "version"}
    assert inside <= pure
    foreign = modules[name].foreign - set(sys.stdlib_module_names)
    assert foreign <= {"yaml"}


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
@pytest.mark.matrix
def test_every_public_name_resolves(ext: RankPool) -> None:
    (found,) = ext.run("tests.support.package_cases:public_names", 1)
    places = {name: f"megatron_ext.{module}" for name, module in megatron_ext._WHERE.items()}
    assert {name: module for name, (_, module) in found.items() if name in places} == places
    assert set(found) == set(megatron_ext.__all__)
    functions = {name for name, (kind, _) in found.items() if kind == "function"}
    assert functions == {
        "add_arguments",
        "enable",
        "get_megatron_optimizer",
        "transform_moments",
    }


def test_help_shows_the_names_with_their_first_sentences_and_imports_nothing() -> None:
    assert heavy_modules_after("import megatron_ext, pydoc; pydoc.render_doc(megatron_ext)") == []
    text = " ".join(pydoc.render_doc(megatron_ext, renderer=pydoc.plaintext).split())
    for name, module in megatron_ext._WHERE.items():
        tree = ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text())
        (node,) = [n for n in tree.body if getattr(n, "name", None) == name]
        assert isinstance(node, ast.ClassDef | ast.FunctionDef)
        first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        assert f"- `{name}`: {first}" in text


def test_the_command_alone_prints_one_line_for_each_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main([])
    assert exit_.value.code == 0
    _, _, listed = capsys.readouterr().out.partition("  COMMAND\n")
    lines = [line.split() for line in listed.splitlines()]
    commands = next(a.choices for a in cli.command_line()._actions if a.choices)
    assert [name for name, *_ in lines] == list(commands or ())
    assert all(len(words) > 3 for words in lines)


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


def test_megatron_is_an_extra_and_no_dependency() -> None:
    """A wheel would be installed beside the checkout that a container has on PYTHONPATH."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [need for need in project["dependencies"] if "megatron" in need] == []
    assert project["optional-dependencies"]["megatron"] == [f"megatron-core>={TESTED[0]}"]


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
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert len(found) > 100
    assert [name for name, asserts in found.items() if not asserts] == []


def test_the_check_for_assertions_can_fail() -> None:
    assert not says_something(ast.parse("def test_x():\n    run()\n    check = 1"))
    assert says_something(ast.parse("def test_x():\n    np.testing.assert_array_equal(1, 1)"))
