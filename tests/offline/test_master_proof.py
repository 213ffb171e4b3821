"""Offline: the stored master weights are the stored weights of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.stored import open_checkpoint
from megatron_ext.cli import main
from megatron_ext.offline import master_proof
from tests.conftest import FIRST, STEPS, Checkpoints
from tests.support.cells import chosen
from tests.support.harness import Layout
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

FULL = Layout(format="fully_reshardable")
#: Layout and ranks of checkpoints whose state belongs to the model.
CELLS = {
    "bf16": (FULL, 1),
    "fp16, 2 ranks": (replace(FULL, dtype="fp16"), 2),
    "fp32": (replace(FULL, dtype="fp32"), 1),
    "not distributed": (replace(FULL, distributed=False), 1),
    "tp 2": (replace(FULL, tp=2), 2),
    "gated": (replace(FULL, gated=True), 1),
}
RAN: list[str] = []


@pytest.mark.parametrize("name", CELLS)
def test_every_master_weight_is_the_models(name: str, checkpoints: Checkpoints) -> None:
    layout, world = CELLS[name]
    directory, _ = checkpoints.phase_1(layout, world)
    stored = open_checkpoint(directory)
    read: list[int] = []
    proof = master_proof.prove(stored, read.append)
    masters = {key: stored.tensors[key] for key in master_proof.masters_of(stored)}
    assert proof.elements == sum(map(_numel, masters.values())) > 5000
    assert proof.differences == ()
    assert sum(read) == master_proof.bytes_of(stored) == 4 * proof.elements
    RAN.append(name)


def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 6
    assert len(RAN) == len(set(RAN)) == chosen(request, test_every_master_weight_is_the_models)


def _numel(shape: tuple[int, ...] | None) -> int:
    count = 1
    for size in shape or ():
        count *= size
    return count


@pytest.fixture
def edited(stock: RankPool, tmp_path: Path) -> Callable[..., str]:
    def make(layout: Layout, case: str = "proof_stock:edited", world: int = 1) -> str:
        directory = str(tmp_path / "edited")
        arguments: dict[str, Any] = {"layout": layout, "hyper": FIRST, "steps": STEPS}
        stock.run(f"tests.support.{case}", world, **arguments, directory=directory)
        return directory

    return make


def test_edited_weights_are_found(
    edited: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = open_checkpoint(edited(FULL))
    proof = master_proof.prove(stored)
    assert {d.name for d in proof.differences} == {
        name for name in master_proof.masters_of(stored).values() if "mlp" in name
    }
    monkeypatch.setattr("megatron_ext.offline.slabs.SLAB_BYTES", 64)
    assert master_proof.prove(stored) == proof
    fc1 = next(d for d in proof.differences if d.name.endswith("linear_fc1.weight"))
    assert 0 < fc1.elements <= fc1.of == 2 * 32 * 16
    assert fc1.largest > 0.01


def test_what_has_no_names_is_not_compared(checkpoints: Checkpoints) -> None:
    directory, _ = checkpoints.phase_1(Layout(), 1)
    stored = open_checkpoint(directory)
    assert master_proof.prove(stored) == master_proof.MasterProof(0, ())
    assert master_proof.explain(stored, master_proof.MasterProof(0, ())) == []


def test_inspect_and_diff_tell_a_save_that_stock_has_written_wrongly(
    edited: Callable[..., str], checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = edited(replace(FULL, overlap=True, hidden=12), "mapped_stock:phase_1", 2)
    right, _ = checkpoints.phase_1(FULL, 1)
    assert main(["inspect", wrong, "--moments"]) == 1
    text = capsys.readouterr().out
    assert "elements are the model's weights, rounded to their dtype" in text
    assert "stock Megatron 0.16 to 0.19 stores shifted tensors" in text
    assert "--selective-master-weights model" in text
    assert main(["inspect", right, "--moments", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["master_weights"]
    assert found["differences"] == []
    assert found["elements"] > 0
    assert main(["diff", right, right, "--moments"]) == 0
    assert "b: master weights: " in capsys.readouterr().out
    assert main(["diff", wrong, wrong, "--moments", "--json"]) == 1
    of_both = json.loads(capsys.readouterr().out)["master_weights"]
    assert of_both[0] == of_both[1]
    assert of_both[0]["differences"][0]["elements"] > 0
