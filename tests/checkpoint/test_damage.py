"""A truncated, missing or foreign file: every command says which, in one line, with status 2."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.cli import main
from tests.support import specimens
from tests.support.cells import chosen
from tests.support.checkpoints import checksums
from tests.support.damages import DAMAGES
from tests.support.pool import ROOT

#: File -> the form of checkpoint that has it, and its path below the directory of ``--load``.
FILES = {
    "tracker": ("common.pt", "latest_checkpointed_iteration.txt"),
    "tracker of legacy": ("torch", "latest_checkpointed_iteration.txt"),
    "metadata.json": ("common.pt", f"{specimens.ITERATION}/metadata.json"),
    ".metadata": ("common_state", f"{specimens.ITERATION}/.metadata"),
    ".metadata before 0.19": ("common.pt", f"{specimens.ITERATION}/.metadata"),
    "common.pt": ("common.pt", f"{specimens.ITERATION}/common.pt"),
    ".distcp with tensors": ("common.pt", f"{specimens.ITERATION}/{specimens.TENSOR_FILE}"),
    ".distcp with the state": (
        "common_state",
        f"{specimens.ITERATION}/{specimens.STATE_FILE}",
    ),
    "model_optim_rng.pt": ("torch", f"{specimens.ITERATION}/mp_rank_00/model_optim_rng.pt"),
    "model_optim_rng.pt of the second": (
        "torch",
        f"{specimens.ITERATION}/mp_rank_01/model_optim_rng.pt",
    ),
    "distrib_optim.pt": ("torch", f"{specimens.ITERATION}/mp_rank_00/distrib_optim.pt"),
    "distrib_optim.pt of the second": (
        "torch",
        f"{specimens.ITERATION}/mp_rank_01/distrib_optim.pt",
    ),
}
COMMANDS = tuple(specimens.commands(ROOT, ROOT, ROOT))


#: Where it cannot be seen: the bytes of tensors are read with --moments only.
UNSEEN = {
    (".distcp with tensors", damage): {c for c in COMMANDS if "--moments" not in c}
    for damage in ("another file", "another zip file")
}
RAN: list[tuple[str, str, str]] = []


def cells() -> list[tuple[str, str]]:
    return [(file, damage) for file in FILES for damage in DAMAGES]


@pytest.mark.parametrize(("file", "damage"), cells())
def test_the_file_is_named(
    file: str, damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form, name = FILES[file]
    root, other, out = (tmp_path / n for n in ("root", "other", "new"))
    specimens.specimen(form, root)
    specimens.specimen(form, other)
    DAMAGES[damage](root / name)
    before = checksums(root)
    for command, words in specimens.commands(root, other, out).items():
        RAN.append((file, damage, command))
        status = main(words)
        told = capsys.readouterr()
        if command in UNSEEN.get((file, damage), set()):
            assert status == 0
            assert told.err == ""
            shutil.rmtree(out, ignore_errors=True)
            continue
        assert (status, told.out) == (2, "")
        assert told.err.startswith("error: ")
        assert told.err.count("\n") == 1
        assert Path(name).name in told.err
        assert str(root) in told.err
        assert str(other) not in told.err
        # What can be done about it.
        assert any(w in told.err for w in ("estore", "Write the number", "Check --load", "Save it"))
        assert "Traceback" not in told.err
        assert not out.exists()
        assert not list(tmp_path.glob(".new*"))
    assert checksums(root) == before


def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(cells()) * len(COMMANDS) == 12 * 8 * 7
    assert len(RAN) == len(set(RAN)) == chosen(request, test_the_file_is_named) * len(COMMANDS)


@pytest.mark.parametrize("form", specimens.FORMS)
def test_without_damage_every_command_works(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, other, out = (tmp_path / n for n in ("root", "other", "new"))
    specimens.specimen(form, root)
    specimens.specimen(form, other)
    for command, words in specimens.commands(root, other, out).items():
        status = main(words)
        legacy = form == "torch" and "--moments" in command
        assert status == (2 if legacy else 0), capsys.readouterr()


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    root = tmp_path / "root"
    file = specimens.specimen("common.pt", root) / "common.pt"
    file.chmod(0)
    limited: list[str] = []
    if os.geteuid() == 0:  # root reads everything, unless it may not
        if (tool := shutil.which("setpriv")) is None:
            pytest.skip("no setpriv, and this is root")
        limited = [tool, "--bounding-set", "-dac_override,-dac_read_search"]
    command = [*limited, sys.executable, "-m", "megatron_ext", "inspect", str(root)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: cannot read {file}: PermissionError: ")
    assert "Let the user that runs this read it" in run.stderr
    assert "damaged" not in run.stderr
