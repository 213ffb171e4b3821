"""Which copy of Megatron runs: the script's own, and one error where none can be used.

The copies are what `.ci/overlay` installs, without the metadata that pip writes beside a wheel.
What plain Python finds is the oracle.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_ext import launch
from megatron_ext.errors import HostError
from megatron_ext.host import megatron
from tests.support.pool import ROOT, overlay
from tests.support.training import words

pytestmark = pytest.mark.e2e

#: Finds Megatron without importing it; under the launcher it has been imported.
SCRIPT = """
import importlib.util, sys
print("RUNS", importlib.util.find_spec("megatron.core").origin, flush=True)
core = sys.modules.get("megatron.core")
print("IMPORTED", core and core.__version__.split("+")[0], core and core.__file__)
sys.exit()
"""
OURS = "--optimizer-class megatron_ext.SelectiveAdam"
PHASE = "--lr 3e-5 --min-lr 2e-5 --train-iters 14 --lr-decay-iters 20 --bf16"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Folders: a checkout with a script, another checkout, one that is not complete, others."""
    root = tmp_path_factory.mktemp("places")
    found = SimpleNamespace(
        checkout=copy(root / "checkout", "0.18.2", "core", "training"),
        other=copy(root / "other", "0.17.1", "core", "training"),
        incomplete=copy(root / "incomplete", "0.18.2", "core"),
        elsewhere=root / "elsewhere",
        bare=root / "bare",
        old=overlay("0.14.0"),
    )
    found.elsewhere.mkdir()
    for folder in (found.checkout, found.elsewhere):
        (folder / "script.py").write_text(SCRIPT)
    # The environment of this interpreter without Megatron.
    found.bare.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("megatron", "__editable__")) and entry.suffix != ".pth":
            (found.bare / entry.name).symlink_to(entry)
    return found


def copy(folder: Path, of_version: str, *packages: str) -> Path:
    """A Megatron without metadata, and without megatron/__init__.py as upstream has it."""
    (folder / "megatron").mkdir(parents=True)
    for package in packages:
        (folder / "megatron" / package).symlink_to(overlay(of_version) / "megatron" / package)
    return folder


def start(
    arguments: list[str], cwd: Path, path: Path | str | None = None, site: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a folder, with another one on PYTHONPATH."""
    own = [str(p) for p in (path, ROOT) if p]
    return subprocess.run(
        [sys.executable, *([] if site else ["-S"]), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(own), "OMP_NUM_THREADS": "1"},
    )


def line(text: str, begin: str) -> str:
    (found,) = (one for one in text.splitlines() if one.startswith(begin))
    return found


CPU = ["-m", "megatron_ext.launch", "--cpu"]


@dataclass(frozen=True)
class Case:
    """A script that is started from another folder.

    Args:
        script: The folder of the script.
        cwd: The current directory.
        version: That of the Megatron which runs.
        path: What is on PYTHONPATH.
        site: Whether there is a wheel in site-packages.
        more: The script's arguments.
    """

    script: str
    cwd: str
    version: str
    path: tuple[str, ...] = ()
    site: bool = True
    more: tuple[str, ...] = ()

    def start(
        self, places: SimpleNamespace, before: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess[str]:
        script = getattr(places, self.script) / "script.py"
        path = os.pathsep.join(str(getattr(places, name)) for name in self.path)
        return start([*before, str(script), *self.more], getattr(places, self.cwd), path, self.site)


CASES = {
    "beside the script": Case("checkout", "elsewhere", "0.18.2", more=tuple(OURS.split())),
    "on PYTHONPATH, without a wheel": Case(
        "elsewhere", "checkout", "0.17.1", path=("other", "bare"), site=False
    ),
    "the installed wheel": Case("elsewhere", "checkout", version("megatron-core")),
}


@pytest.fixture(scope="module")
def runs(places: SimpleNamespace) -> dict[str, subprocess.CompletedProcess[str]]:
    """The launcher, and `env`; two processes at a time, which import Megatron."""
    ours = tuple(words(f"{PHASE} {OURS}", places.elsewhere / "report"))
    with ThreadPoolExecutor(2) as executor:
        started = {
            name: executor.submit(
                replace(case, more=ours if case.more else ()).start, places, tuple(CPU)
            )
            for name, case in CASES.items()
        }
        env = ["-m", "megatron_ext", "env", "--json"]
        started["env"] = executor.submit(start, env, places.elsewhere, places.checkout)
        return {name: run.result() for name, run in started.items()}


@pytest.mark.parametrize("name", CASES)
def test_the_launcher_runs_the_megatron_that_plain_python_finds(
    name: str, places: SimpleNamespace, runs: dict[str, subprocess.CompletedProcess[str]]
) -> None:
    plain, run = CASES[name].start(places), runs[name]
    assert run.returncode == plain.returncode == 0, run.stderr[-3000:]
    assert line(run.stdout, "RUNS") == line(plain.stdout, "RUNS")
    _, found, file = line(run.stdout, "IMPORTED").split()
    root = Path(file).parents[2]
    assert (found, root / "megatron/core/__init__.py") == (CASES[name].version, Path(file))
    assert f"megatron_ext: megatron-core {found} from {root}\n" in run.stdout


def test_env_tells_the_version_of_the_checkout_and_not_that_of_the_wheel(
    runs: dict[str, subprocess.CompletedProcess[str]],
) -> None:
    found = json.loads(runs["env"].stdout)
    assert found["versions"]["megatron-core"] == found["megatron"]["version"] == "0.18.2"
    assert version("megatron-core") != "0.18.2"
    assert found["megatron"]["contract"] == []


ENTRANCES = {
    "launcher": [*CPU[:-1], "script.py", *OURS.split()],
    "library": ["-c", "import megatron_ext\nmegatron_ext.get_megatron_optimizer(None, [])"],
    "add_arguments": ["-c", "import megatron_ext\nmegatron_ext.add_arguments(None)"],
    "enable": ["-c", "import megatron_ext\nmegatron_ext.enable()"],
    "class": ["-c", "import megatron_ext\nmegatron_ext.SelectiveAdam"],
}


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The error in one line; the launcher's comes without a traceback."""
    assert done.returncode in (1, 2)
    *_, last = done.stderr.strip().splitlines()
    if done.returncode == 2:
        assert "Traceback" not in done.stderr
    else:
        assert last.startswith("megatron_ext.errors.HostError: "), done.stderr
    return last


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_without_a_megatron_one_error_says_what_is_missing(
    entrance: str, places: SimpleNamespace
) -> None:
    done = start(ENTRANCES[entrance], places.elsewhere, places.bare, site=False)
    error = refused(done)
    assert "found no Megatron" in error
    assert "pip install 'megatron_ext[megatron]'" in error
    assert "PYTHONPATH=/path/to/Megatron-LM" in error


def test_a_plan_without_a_megatron_is_the_same_error(places: SimpleNamespace) -> None:
    """It needs Megatron's param_groups and its scheduler; the other commands need neither."""
    command = ["-m", "megatron_ext", "plan", "script.py", "--lr", "1e-5"]
    done = start(command, places.elsewhere, places.bare, site=False)
    assert done.returncode == 2
    error = " ".join(done.stderr.split())
    assert error.startswith("error: found no Megatron")


def test_cpu_without_a_megatron_is_the_same_error(places: SimpleNamespace) -> None:
    done = start([*CPU, "script.py"], places.elsewhere, places.bare, site=False)
    assert "found no Megatron" in refused(done)


def test_the_demo_without_a_megatron_is_the_same_error(places: SimpleNamespace) -> None:
    command = ["-m", "megatron_ext.demo", "--out", str(places.elsewhere / "demo")]
    done = start(command, places.elsewhere, places.bare, site=False)
    assert "found no Megatron" in refused(done)
    assert not (places.elsewhere / "demo").exists()


@pytest.mark.parametrize(
    ("training", "words"),
    [
        # As the wheel for Python 3.10 and 3.11.
        (None, ["comes without the training loop megatron.training", "3.12 or later (this is"]),
        (
            "import no_such_dependency",
            ["cannot be imported: ModuleNotFoundError: No module named 'no_such_dependency'"],
        ),
    ],
)
def test_a_script_that_cannot_import_the_training_loop(
    training: str | None, words: list[str], places: SimpleNamespace, tmp_path: Path
) -> None:
    folder = copy(tmp_path / "copy", "0.16.1", "core")
    if training is not None:
        (folder / "megatron" / "training").mkdir()
        (folder / "megatron" / "training" / "__init__.py").touch()
        (folder / "megatron" / "training" / "arguments.py").write_text(training)
    script = tmp_path / "script.py"
    script.write_text("import megatron.training.arguments\n")
    path = f"{folder}{os.pathsep}{places.bare}"
    command = ["-m", "megatron_ext.launch", str(script)]
    error = refused(start(command, places.elsewhere, path, site=False))
    for word in (f"megatron-core 0.16.1 from {folder} ", "megatron-core[training]", *words):
        assert word in error
    # What the script cannot import for another reason is its own affair.
    script.write_text("import no_such_package\n")
    done = start(command, places.elsewhere, path, site=False)
    assert done.returncode == 1
    assert done.stderr.endswith("ModuleNotFoundError: No module named 'no_such_package'\n")


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_two_megatrons_that_are_mixed_are_both_named(
    entrance: str, places: SimpleNamespace
) -> None:
    error = refused(start(ENTRANCES[entrance], places.elsewhere, places.incomplete))
    assert f"megatron.core is found in {places.incomplete}," in error
    assert f"megatron.training in {sysconfig.get_path('purelib')}." in error


def test_a_complete_copy_before_an_incomplete_one_is_not_mixed(places: SimpleNamespace) -> None:
    """The ways out that the error names; megatron.bridge may be anywhere."""
    code = "from megatron_ext.host import megatron as m; m.require_one_copy(); print(m.find().root)"
    (places.incomplete / "megatron" / "bridge").mkdir(exist_ok=True)
    both = f"{places.checkout}{os.pathsep}{places.incomplete}"
    done = start(["-c", code], places.elsewhere, both)
    assert done.stdout.strip() == str(places.checkout), done.stderr
    # The other way out: without the incomplete one.
    done = start(["-c", code], places.elsewhere)
    assert done.stdout.strip() == sysconfig.get_path("purelib"), done.stderr


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_an_old_megatron_is_refused_with_the_versions_that_are_supported(
    entrance: str, places: SimpleNamespace
) -> None:
    error = refused(start(ENTRANCES[entrance], places.elsewhere, places.old))
    assert f"megatron-core 0.14.0 from {places.old} is too old" in error
    assert "needs 0.16.1 or later" in error


@pytest.mark.parametrize("text", ["0.16.0", "0.16.1rc0", "0.12.1"])
def test_versions_below_the_first_tested_one_are_too_old(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_ext.host import contract

    found = megatron.Megatron(contract.Version(text), tmp_path)
    monkeypatch.setattr(megatron, "find", lambda: found)
    with pytest.raises(HostError, match=f"megatron-core {text} from {tmp_path} is too old"):
        contract.check_contract()


def test_the_path_is_left_alone_where_python_was_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", before := [str(tmp_path)])
    monkeypatch.setattr(launch.sys, "flags", SimpleNamespace(safe_path=True))
    launch._order_path(tmp_path / "script.py")
    assert before == [str(tmp_path)]
