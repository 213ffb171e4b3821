"""``python -m megatron_ext env``: what is installed, what is active, and its exit status."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from packaging.version import Version

from megatron_ext._ops import native as _native
from megatron_ext._ops.native import Kernel
from megatron_ext.cli import main
from megatron_ext.host import contract, megatron
from tests.support.pool import ROOT, RankPool, overlay

SCHEMA = json.loads(files("megatron_ext").joinpath("schemas/env.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def test_the_document_of_a_real_run_follows_its_schema() -> None:
    command = [sys.executable, "-m", "megatron_ext", "env", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    VALIDATOR.validate(found)
    assert done.returncode == found["status"]
    version = importlib.metadata.version("megatron-core")
    assert found["versions"]["megatron-core"] == found["megatron"]["version"] == version
    assert found["versions"]["python"] == platform.python_version()
    assert found["megatron"]["tested"]
    assert found["megatron"]["training"]
    assert found["megatron"]["contract"] == []
    assert found["kernels"]["cpu"]["active"] == "native"
    if not torch.cuda.is_available():
        assert (found["status"], found["findings"]) == (0, [])
        assert found["cuda_devices"] == []
    if found["versions"]["transformer-engine"] is found["versions"]["apex"] is None:
        assert found["inner_optimizer"] == {
            "class": "torch.optim.adamw.AdamW",
            "reason": "neither transformer-engine nor apex is installed",
            "not_importable": {},
        }
    # What Megatron says while it is imported is not the user's business.
    assert "Transformer Engine and Apex are not installed" not in done.stderr


@pytest.mark.ranks
@pytest.mark.matrix
def test_every_megatron_of_the_matrix_is_told(ext: RankPool, megatron: Version) -> None:
    (found,) = ext.run("tests.support.host_cases:environment", 1, moved=[])
    VALIDATOR.validate(found)
    assert found["megatron"] == {
        "version": str(megatron),
        "tested_versions": list(contract.TESTED),
        "tested": True,
        "in_tested_range": True,
        "training": megatron >= Version("0.17"),
        "contract": [],
    }
    assert found["status"] == 0


@pytest.mark.ranks
def test_a_broken_contract_is_status_2(ext: RankPool) -> None:
    moved = [("megatron.core.optimizer", "no_longer_there", ())]
    (found,) = ext.run("tests.support.host_cases:environment", 1, moved=moved)
    VALIDATOR.validate(found)
    assert found["status"] == 2
    (problem,) = found["megatron"]["contract"]
    assert "megatron.core.optimizer.no_longer_there is gone" in problem
    assert found["findings"] == [problem]


def is_there(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    found = megatron.Megatron(Version(version), Path("/opt/Megatron-LM"))
    monkeypatch.setattr(megatron, "find", lambda: found)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """What Megatron would say here, so that it need not be imported; all is as it should be."""
    is_there(monkeypatch, contract.TESTED[-1])
    monkeypatch.setattr(contract, "contract_problems", lambda: [])
    monkeypatch.setattr(contract, "has_training", lambda: True)
    monkeypatch.setattr(contract, "inner_adam", lambda: "torch.optim.adamw.AdamW")
    monkeypatch.setattr(_native, "kernel", lambda device: Kernel(device, device == "cpu", "why"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")
    monkeypatch.delenv("MEGATRON_EXT_KERNEL", raising=False)
    # As with a checkout alone: there is no distribution of its name.
    installed = importlib.metadata.version

    def version(name: str) -> str:
        if name == "megatron-core":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return monkeypatch


def env(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    status = main(["env", "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    VALIDATOR.validate(found)
    assert found["status"] == status
    return status, found


@pytest.mark.parametrize(
    ("version", "tested", "status"),
    [("0.19.2", True, 0), ("0.18.1", False, 0), ("0.20.0", False, 1)],
)
def test_a_version_outside_the_tested_range_is_a_finding(
    version: str,
    tested: bool,
    status: int,
    answers: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    is_there(answers, version)
    found_status, found = env(capsys)
    assert (found_status, found["megatron"]["tested"]) == (status, tested)
    expected = f"megatron-core {version} is outside the range this package is tested with, 0.16.1"
    assert [f.startswith(expected) for f in found["findings"]] == [True] * status


def test_a_version_that_is_too_old_is_status_2(
    answers: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    is_there(answers, "0.15.3")
    status, found = env(capsys)
    (problem,) = found["findings"]
    assert problem.startswith("megatron-core 0.15.3 from /opt/Megatron-LM is too old")
    assert (status, found["megatron"]["contract"]) == (2, [problem])
    assert found["versions"]["megatron-core"] == found["megatron"]["version"] == "0.15.3"
    assert main(["env"]) == 2
    shown = " ".join(capsys.readouterr().out.split())
    assert "Megatron API contract not checked" in shown


@pytest.mark.parametrize(
    ("native", "devices", "asked", "missing"),
    [
        (("cpu",), 0, "auto", []),
        (("cpu", "cuda"), 2, "auto", []),
        (("cpu",), 2, "auto", ["cuda"]),
        ((), 0, "auto", ["cpu"]),
        ((), 2, "auto", ["cpu", "cuda"]),
        ((), 2, "reference", []),
    ],
)
def test_a_missing_kernel_is_a_finding_where_the_device_is_there(
    native: tuple[str, ...],
    devices: int,
    asked: str,
    missing: list[str],
    answers: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers.setattr(_native, "kernel", lambda d: Kernel(d, d in native, "not built: no toolkit"))
    answers.setattr(torch.cuda, "device_count", lambda: devices)
    answers.setenv("MEGATRON_EXT_KERNEL", asked)
    status, found = env(capsys)
    assert found["findings"] == [f"no compiled {d} kernel: not built: no toolkit" for d in missing]
    assert status == int(bool(missing))
    assert found["cuda_devices"] == [f"GPU {n}" for n in range(devices)]


def test_on_rocm_the_reference_kernel_is_named_and_is_no_problem(
    answers: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "not built: torch 2.10.0+rocm6.4 is built with ROCm 6.4, for which there is no kernel"
    answers.setattr(_native, "kernel", lambda d: Kernel(d, d == "cpu", reason))
    answers.setattr(torch.cuda, "device_count", lambda: 2)
    answers.setattr(torch.version, "hip", "6.4")
    status, found = env(capsys)
    assert (status, found["findings"]) == (0, [])
    assert found["kernels"]["cuda"] == {"active": "reference", "reason": reason}


def test_a_megatron_that_cannot_be_imported_is_status_2(
    answers: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> str:
        raise ImportError("libcudart.so: cannot open")

    answers.setattr(contract, "inner_adam", broken)
    status, found = env(capsys)
    problem = "megatron.core cannot be imported: ImportError: libcudart.so: cannot open"
    assert (status, found["findings"]) == (2, [problem])
    assert found["versions"]["megatron-core"] == contract.TESTED[-1]
    assert found["inner_optimizer"]["class"] is None


def test_a_fused_adam_that_cannot_be_imported_is_a_finding(
    answers: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Megatron then takes torch's, with one warning among many."""
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open')")
    answers.syspath_prepend(str(tmp_path))
    status, found = env(capsys)
    said = "apex is installed and cannot be imported: OSError: libcuda.so.1: cannot open"
    assert (status, found["findings"]) == (1, [said])
    assert found["inner_optimizer"]["reason"] == said
    assert found["versions"]["apex"] == "present, version unknown"
    assert found["paths"]["apex"] == str(tmp_path)


def test_a_checkout_over_a_wheel_is_told_apart_from_it(tmp_path: Path) -> None:
    older = "0.18.2"
    (tmp_path / "megatron").symlink_to(overlay(older) / "megatron")
    apex = tmp_path / "apex"
    apex.mkdir()
    (apex / "__init__.py").write_text("__version__ = '0.2+local'")
    metadata = tmp_path / "apex-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: apex\nVersion: 0.1\n")
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ext", "env", "--json"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = json.loads(done.stdout)
    VALIDATOR.validate(found)
    assert done.returncode == found["status"] == 1
    assert found["versions"]["megatron-core"] == found["megatron"]["version"] == older
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["apex"] == "0.2+local"
    assert found["paths"]["torch"] == str(Path(torch.__file__).parents[1])
    assert found["paths"]["megatron-core"] == found["paths"]["apex"] == str(tmp_path)
    wheel = importlib.metadata.version("megatron-core")
    for name, version, installed in (
        ("megatron-core", older, wheel),
        ("apex", "0.2+local", "0.1"),
    ):
        assert (
            f"{name} {version} is imported from {tmp_path}, but the installed distribution is "
            f"{installed}. Uninstall that one, or take {tmp_path} off Python's path"
        ) in found["findings"]


def test_the_table_says_what_is_active_and_why_not(
    answers: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers.setattr(contract, "has_training", lambda: False)
    is_there(answers, "0.20.0")
    answers.setattr(_native, "kernel", lambda d: Kernel(d, False, "[red]not built\x1b[2J"))
    core = sum(not name.module.startswith("megatron.training") for name in contract.CONTRACT)
    assert main(["env"]) == 1
    shown = capsys.readouterr().out
    for words in (
        "not tested itself (tested versions: 0.16.1, 0.17.1, 0.18.2, 0.19.2)",
        "not installed",
        f"{core} of {core} names found",
        "torch.optim.adamw.AdamW: neither transformer-engine nor apex is installed",
        r"reference: [red]not built\x1b[2J",
        "problem: megatron-core 0.20.0 is outside the range",
    ):
        assert words in shown
    assert "\x1b" not in shown


def test_the_table_counts_the_names_of_megatron_that_are_missing(
    answers: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers.setattr(contract, "contract_problems", lambda: ["megatron.core.one is gone"])
    assert main(["env"]) == 2
    shown = capsys.readouterr().out
    count = len(contract.CONTRACT)
    assert f"{count - 1} of {count} names found" in shown
    assert "problem: megatron.core.one is gone" in shown


def test_a_kernel_that_cannot_be_obeyed_is_one_error(
    answers: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_ext.errors import HostError

    def refused(device: str) -> Kernel:
        raise HostError("MEGATRON_EXT_KERNEL is 'fast'; it must be auto, native or reference")

    answers.setattr(_native, "kernel", refused)
    assert main(["env", "--json"]) == 2
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
    assert told.err.startswith("error: MEGATRON_EXT_KERNEL is 'fast'; it must be")


def test_a_required_package_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container after ``pip install --no-deps``."""
    for name in [m for m in sys.modules if m.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["env"]) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: the module rich\S* is not installed\. Install the package", error)
    assert "unexpected" not in error
