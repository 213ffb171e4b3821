"""The list of rules that the kernels are compiled with is that of the registered rules."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_ext._ops import native
from megatron_ext.errors import HostError
from megatron_ext.rules import registry
from tests.support.half_rule import half

ROOT = Path(__file__).resolve().parents[2]


def test_the_kernels_source_lists_the_registered_rules() -> None:
    listed = re.findall(
        r"^  RULE\((\w+), (\d+), (\d+), (\w+), (\w+)\)",
        (ROOT / "csrc/element_rule.h").read_text(),
        re.MULTILINE,
    )
    assert "".join(f"\n{' '.join(line)}" for line in listed) == registry.manifest()


def test_the_compiled_library_lists_the_registered_rules() -> None:
    assert native.built_rules(native.library("cpu")) == registry.manifest()


def test_a_library_with_another_list_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "_registered", list(registry.rules()))
    registry.register(half())
    reason = "_cpu.so was built with other moment rules than are registered: build it again"
    assert native._load("cpu") == reason
    monkeypatch.setenv(native.ENVIRONMENT, "native")
    with pytest.raises(HostError, match=f"no compiled kernels for cpu: {reason}"):
        native.load()
    (tmp_path / "_cpu.so").write_bytes(b"\x7fELF without a list")
    monkeypatch.setattr(native, "_DIRECTORY", tmp_path)
    assert native.built_rules(native.library("cpu")) is None
    assert native._load("cpu") == reason


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("halve, 99, 0, pointwise, true", "a rule of MEGATRON_EXT_RULES has no arithmetic"),
        ("halve, 99, 0, joint, true", "loops over both moments are missing for halve"),
        ("halve, 99, 7, pointwise, true", "halve has too many coefficients"),
        ("halve, 99, 0, sideways, true", "sideways"),
    ],
)
def test_a_rule_that_is_only_listed_does_not_compile(
    tmp_path: Path, line: str, message: str
) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    header = tmp_path / "csrc/element_rule.h"
    text = header.read_text()
    for extra, found in (("", ""), (f"  RULE({line}) \\\n", message)):
        header.write_text(text.replace("  RULE(scale", f"{extra}  RULE(scale"))
        source = tmp_path / "csrc/cpu/loops_baseline.cpp"
        done = subprocess.run(
            ["c++", "-std=c++20", "-fsyntax-only", str(source)], capture_output=True, text=True
        )
        assert (done.returncode == 0) == (not found), done.stderr
        assert found in done.stderr
