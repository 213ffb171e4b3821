"""The contract with Megatron: named, versioned, and inert unless asked for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from packaging.version import Version

import megatron_ext
from megatron_ext.host.contract import CONTRACT, TESTED
from tests.support import structure
from tests.support.pool import RankPool

pytestmark = [pytest.mark.ranks, pytest.mark.matrix]

PACKAGE = Path(megatron_ext.__file__).parent


def test_the_installed_megatron_keeps_the_contract(ext: RankPool, megatron: Version) -> None:
    found = ext.run("tests.support.host_cases:contract", 1)[0]
    assert Version(found["version"]) == megatron
    assert not found["rebound twice"]
    expected = {
        (name.module, name.attribute)
        for name in CONTRACT
        if name.rebound
        and name.attribute != "add_megatron_arguments"  # the launcher's, not the library's
        and Version(name.since) <= megatron
        and (not name.module.startswith("megatron.training") or megatron >= Version("0.17"))
    }
    assert set(found["rebound"]) == expected
    assert len(expected) >= 4


def test_a_moved_name_is_named_with_both_versions(ext: RankPool, megatron: Version) -> None:
    message = ext.run(
        "tests.support.host_cases:broken_contract",
        1,
        moved=[
            ("megatron.core.optimizer", "no_longer_there", ()),
            ("megatron.core.optimizer", "get_megatron_optimizer", ("no_such_parameter",)),
            ("megatron.core.no_such_module", "anything", ()),
        ],
    )[0]
    assert str(megatron) in message
    assert TESTED[0] in message
    assert TESTED[-1] in message
    assert "megatron.core.optimizer.no_longer_there is gone" in message
    assert "get_megatron_optimizer has no parameter no_such_parameter" in message
    assert "megatron.core.no_such_module.anything is gone" in message


@pytest.mark.parametrize(("version", "count"), [("0.19.7", 0), ("0.20.0", 1), ("0.17.0", 0)])
def test_another_version_warns_once(version: str, count: int, ext: RankPool) -> None:
    messages = ext.run("tests.support.host_cases:version_warnings", 1, version=version)[0]
    assert len(messages) == count
    assert all(version in m and TESTED[0] in m for m in messages)


def test_nothing_changes_without_a_request(ext: RankPool) -> None:
    found = ext.run("tests.support.host_cases:stock_after_install", 1)[0]
    assert found == {
        "types": ["DistributedOptimizer"],
        "module": "megatron.core.optimizer.distrib_optimizer",
        "global": "megatron.core.optimizer.distrib_optimizer",
        "members": 0,
    }


def test_megatron_is_imported_where_its_names_are_listed() -> None:
    """Below host, hooks and resume; api calls its builder, cpu and demo stand in for a run."""
    modules = structure.read(PACKAGE)
    assert len(modules) > 100
    may_import = {"host", "hooks", "resume", "api", "cpu", "demo"}
    found = {structure.room(name) for name, m in modules.items() if "megatron" in m.foreign}
    assert "resume" in found
    assert found <= may_import


def test_the_oracle_does_not_import_this_package() -> None:
    for name in ("oracle.py", "harness.py"):
        source = (Path(__file__).parents[1] / "support" / name).read_text()
        for node in ast.walk(ast.parse(source)):
            modules = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not [m for m in modules if m.startswith("megatron_ext")]


def test_the_oracle_runs_where_this_package_cannot_be_imported(stock: RankPool) -> None:
    assert stock.run("tests.support.oracle:importable", 1, name="megatron_ext") == [False]
    assert stock.run("tests.support.oracle:importable", 1, name="megatron.core") == [True]
