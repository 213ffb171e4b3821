"""Pickles that would run a command do not, whichever command reads the checkpoint.

`inspect` and `diff` build no object of a pickle, only placeholders. `edit` loads what it has
to write again, from a stated list of classes, unless --allow-pickle is given.
"""

from __future__ import annotations

import importlib
import pickle
import sys
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.cli import main
from tests.checkpoint.test_stored import Evil
from tests.support import specimens
from tests.support.cells import chosen
from tests.support.checkpoints import checkpoint
from tests.support.pool import ROOT

#: The file, and the form of checkpoint that has it.
PLACES = {
    "common.pt": "common.pt",
    "common_state": "common_state",
    "model_optim_rng.pt": "torch",
    ".metadata": "common_state",
}
COMMANDS = tuple(specimens.commands(ROOT, ROOT, ROOT))
RAN: list[tuple[str, str, str]] = []


def poison(place: str, where: str, directory: Path, marker: Path) -> None:
    """Put the payload where reading passes it over, or where something is looked for."""
    form = PLACES[place]
    if place == ".metadata":
        path = directory / ".metadata"
        index = pickle.loads(path.read_bytes())
        index.storage_meta = Evil(marker)
        path.write_bytes(pickle.dumps(index if where == "aside" else Evil(marker)))
        return
    state = specimens.state_of(form, directory)
    state["args"] = Evil(marker)
    if where == "in the way":
        state["optimizer"]["optimizer"]["param_groups"] = Evil(marker)
    specimens.write_state(form, directory, state)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("where", ["aside", "in the way"])
@pytest.mark.parametrize("place", PLACES)
def test_nothing_runs(
    place: str, where: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker, root, out = tmp_path / "ran", tmp_path / "root", tmp_path / "new"
    form = PLACES[place]
    directory = specimens.specimen(form, root)
    specimens.specimen(form, tmp_path / "other")
    poison(place, where, directory, marker)
    status = main(specimens.commands(root, tmp_path / "other", out)[command])
    told = capsys.readouterr()
    assert not marker.exists()
    assert not out.exists()
    RAN.append((place, where, command))
    moments_of_legacy = form == "torch" and "--moments" in command
    if where == "aside" and command != "edit" and not moments_of_legacy:
        assert status == int(command.startswith("diff") and place != ".metadata")
        assert told.err == ""
        return
    assert status == 2
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    if not moments_of_legacy:
        assert str(root) in told.err
    if command == "edit" and where == "aside":
        assert "needs posix.system, which is not on the list" in told.err
        assert "pass --allow-pickle" in told.err
        # What the flag says is what it does.
        main([*specimens.commands(root, tmp_path / "other", out)[command], "--allow-pickle"])
        assert marker.exists()


def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(PLACES) * 2 * len(COMMANDS) == 56
    assert len(RAN) == len(set(RAN)) == chosen(request, test_nothing_runs)


def test_an_index_that_edit_only_copies_does_not_run_either(tmp_path: Path) -> None:
    directory = specimens.specimen("common.pt", tmp_path / "root")
    marker = tmp_path / "ran"
    path = directory / ".metadata"
    index = pickle.loads(path.read_bytes())
    index.storage_meta = Evil(marker)
    path.write_bytes(pickle.dumps(index))
    command = specimens.commands(tmp_path / "root", tmp_path, tmp_path / "new")["edit"]
    assert main(command) == 0
    assert not marker.exists()
    copy = tmp_path / "new" / specimens.ITERATION / ".metadata"
    assert copy.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("form", specimens.FORMS)
def test_no_module_is_imported_for_a_checkpoint(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Importing runs code too: the module of an unknown class is not looked for."""
    marker = tmp_path / "imported"
    lines = f"open({str(marker)!r}, 'w').close()\nclass Thing: pass\n"
    (tmp_path / "made_up_module.py").write_text(lines)
    monkeypatch.syspath_prepend(str(tmp_path))
    root, other, out = (tmp_path / name for name in ("root", "other", "new"))
    specimens.specimen(form, other)
    directory = specimens.specimen(form, root)
    state = specimens.state_of(form, directory)
    state["args"].thing = importlib.import_module("made_up_module").Thing()
    specimens.write_state(form, directory, state)
    assert marker.exists()
    del sys.modules["made_up_module"]
    marker.unlink()
    for command, words in specimens.commands(root, other, out).items():
        status = main(words)
        told = capsys.readouterr()
        assert not marker.exists()
        if command == "edit":
            assert status == 2
            assert "needs made_up_module.Thing, which is not on the list" in told.err
            assert main([*words, "--allow-pickle"]) == 0
            assert marker.exists()
    del sys.modules["made_up_module"]


def cycle() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


GROUP: dict[Any, Any] = {"max_lr": 1e-3, "params": []}
#: Common states that no run of Megatron writes.
ODD: dict[str, Any] = {
    "keys that are no texts": {"optimizer": {"optimizer": {"param_groups": [{1: 2, **GROUP}]}}},
    "an infinite step": {"optimizer": {"optimizer": {"param_groups": [{"step": inf, **GROUP}]}}},
    "a cycle": {"optimizer": {"optimizer": {"param_groups": [{"x": cycle(), **GROUP}]}}},
    "a scheduler that is a list": {
        "opt_param_scheduler": [1],
        "optimizer": {"optimizer": {"param_groups": [GROUP]}},
    },
}


@pytest.mark.parametrize("name", ODD)
def test_what_no_run_writes_is_an_error_and_no_answer(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 1 is an answer of inspect, diff and plan; Python gives it to a traceback too."""
    root = checkpoint(tmp_path / "root", format="torch")
    torch.save(ODD[name], next(root.rglob("model_optim_rng.pt")))
    commands = specimens.commands(root, root, tmp_path / "new")
    refused = 0
    for command in commands.values():
        code = main(command)
        said = capsys.readouterr().err
        assert code in (0, 2), (command, said)
        assert (code == 2) == said.startswith("error: ")
        assert "Traceback" not in said
        refused += code == 2
    assert refused > 0
