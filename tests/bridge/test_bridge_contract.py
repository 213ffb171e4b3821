"""Every name of Megatron-Bridge that the package uses is in the contract, and is where it says."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import megatron_ext
from megatron_ext.host import bridge_contract
from megatron_ext.host.bridge_contract import BRIDGE_CONTRACT, TESTED_BRIDGE
from tests.support.pool import RankPool

PACKAGE = Path(megatron_ext.__file__).parent
SOURCES = [path.read_text() for path in sorted((PACKAGE / "hooks").glob("bridge*.py"))]
OVERLAY = (PACKAGE.parent / ".ci" / "overlay").read_text()


def test_every_name_that_is_used_is_in_the_contract() -> None:
    """Those taken from a module that is imported by one of the contract's constants."""
    trees = [ast.parse(text) for text in SOURCES]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {k: v for k, v in vars(bridge_contract).items() if str(v).startswith("megatron.br")}
    used = set()
    variables: dict[str, str] = {}
    imports = ("importlib.import_module(" + name + ")" for name in modules)
    texts = {text: name for text, name in zip(imports, modules, strict=True)}
    for node in nodes:
        if isinstance(node, ast.Assign) and ast.unparse(node.value) in texts:
            variables[ast.unparse(node.targets[0])] = texts[ast.unparse(node.value)]
    for node in nodes:
        if isinstance(node, ast.Attribute):
            begin = ast.unparse(node.value)
            if name := texts.get(begin) or variables.get(begin):
                used.add((modules[name], node.attr))
    assert len(used) >= 4
    listed = {(n.module, n.attribute.partition(".")[0]) for n in BRIDGE_CONTRACT}
    assert used - listed == set()


def test_every_name_of_the_contract_is_used() -> None:
    text = "\n".join(SOURCES)
    unused = [n.attribute for n in BRIDGE_CONTRACT if not set(n.attribute.split(".")) & words(text)]
    assert unused == []


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


@pytest.mark.usefixtures("bridge")
def test_every_reference_is_the_line_that_is_meant() -> None:
    (core,) = importlib.util.find_spec("megatron.bridge").submodule_search_locations
    for name in BRIDGE_CONTRACT:
        file, number = re.match(r"([\w/]+\.py):(\d+);", name.reference).groups()
        line = (Path(core) / file).read_text().splitlines()[int(number) - 1]
        last = name.attribute.rpartition(".")[2]
        assert re.search(rf"\b{last}\b", line), (name, line)


def test_the_tests_install_the_version_that_is_named() -> None:
    assert f"megatron-bridge=={TESTED_BRIDGE}" in OVERLAY


@pytest.mark.ranks
def test_a_missing_extension_point_is_named_with_the_version(bridge: RankPool) -> None:
    kinds = [n for n in BRIDGE_CONTRACT if not n.instance]
    removed = [(n.module, n.attribute) for n in kinds]
    (messages,) = bridge.run("tests.support.bridge_calls:without", 1, removed=removed)
    for name, message in zip(kinds, messages, strict=True):
        assert f"megatron-bridge {TESTED_BRIDGE} lacks" in message, name
        assert f"{name.module}.{name.attribute} is gone" in message, name
        assert f"Install megatron-bridge=={TESTED_BRIDGE}" in message
    assert len(messages) >= 6


@pytest.mark.ranks
def test_another_version_that_has_every_name_is_a_warning(bridge: RankPool) -> None:
    (said,) = bridge.run("tests.support.bridge_calls:warned", 1, version="0.7.0+local")
    (warning,) = said
    assert warning.startswith("megatron-bridge 0.7.0 is not the version")
    assert TESTED_BRIDGE in warning
    assert bridge.run("tests.support.bridge_calls:warned", 1, version=TESTED_BRIDGE) == [[]]
