"""The master weights that are loaded are proven to be the weights that the model has loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.resume import proof
from megatron_ext.resume.proof import Difference, Proof
from tests.conftest import FIRST, STEPS, Checkpoints
from tests.resume.test_optimizer import resume
from tests.resume.test_resume import SECOND, assert_same_state
from tests.support.cells import chosen, of_every_version
from tests.support.harness import Layout
from tests.support.pool import Failure, RankPool

BF16 = Layout()
MORE = 2


def weights(n: int = 1000, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def compared(weight: torch.Tensor, master: Any, begin: int = 0, end: int | None = None) -> Proof:
    found = Proof()
    found.compare(weight, master, begin, weight.numel() if end is None else end)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_master_weights_that_round_to_the_weights_are_proven(dtype: torch.dtype) -> None:
    master = weights()
    found = compared(master.to(dtype).view(10, 100), master[200:900], 200, 900)
    assert (found.proven, found.differing) == (700, 0)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("now", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("part", [64, 999, 5000])
def test_the_weights_may_have_been_stored_in_another_dtype(
    stored: torch.dtype, now: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proof, "_ELEMENTS_AT_A_TIME", part)
    master = weights()
    weight = master.to(stored).to(now, copy=True)
    assert compared(weight, master).proven == 1000
    weight[-1] += 1
    assert compared(weight, master).differences[id(weight)].of == 1000


def test_every_element_that_differs_is_counted() -> None:
    master = weights().round()
    weight = master.bfloat16()
    for at in (0, 63, 64, 998, 999):
        weight[at] += 2
    found = compared(weight, master)
    assert found.differences == {id(weight): Difference(5, 1000, 2.0)}
    assert (found.proven, found.differing) == (0, 5)


def test_the_smallest_difference_is_one() -> None:
    master = weights()
    weight = master.bfloat16()
    weight.view(torch.int16)[7] ^= 1
    assert compared(weight, master).differing == 1


def test_a_nan_is_the_same_as_a_nan_and_as_nothing_else() -> None:
    master = weights()
    master[3], master[4] = float("nan"), float("inf")
    weight = master.bfloat16()
    assert compared(weight, master).proven == 1000
    weight[3], weight[5] = 0.0, float("nan")
    assert compared(weight, master).differences[id(weight)].elements == 2


def test_other_weights_of_the_same_size_differ() -> None:
    found = compared(weights(seed=1).bfloat16(), weights(seed=2))
    assert found.differing > 990


def test_what_cannot_be_compared_is_not_counted() -> None:
    class Quantized(torch.Tensor):
        pass

    weight = weights().bfloat16()
    for found in (
        compared(weight, torch.zeros(1000, dtype=torch.int16)),
        compared(weight.as_subclass(Quantized), weights()),
    ):
        assert (found.proven, found.differences) == (0, {})


#: Layout and ranks.
CELLS = {
    "dp_reshardable": (BF16, 2),
    "fully_reshardable": (replace(BF16, format="fully_reshardable"), 2),
    "legacy": (replace(BF16, format="torch"), 2),
    "fp16": (replace(BF16, dtype="fp16"), 2),
    "fp32": (replace(BF16, dtype="fp32"), 2),
    "buckets": (replace(BF16, overlap=True), 2),
    "tp 2": (replace(BF16, tp=2), 2),
    "pp 2": (replace(BF16, pp=2), 2),
    "experts": (Layout(experts=4, ep=2), 2),
    "torch AdamW": (replace(BF16, adam="torch"), 1),
    "not distributed": (replace(BF16, distributed=False), 1),
    "not distributed, legacy": (replace(BF16, distributed=False, format="torch"), 1),
    "not distributed, fp16": (replace(BF16, distributed=False, dtype="fp16"), 1),
}
RAN: list[str] = []


@pytest.mark.ranks
@pytest.mark.parametrize("name", of_every_version(CELLS, ["legacy", "not distributed"]))
def test_every_master_weight_of_a_resume_is_proven(
    name: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    layout, world = CELLS[name]
    directory, _ = checkpoints.phase_1(layout, world)
    found = resume(ext, world, directory, layout=layout, more=0)[0]
    for optimizer in found["report"]["optimizers"]:
        loaded = optimizer["loaded"]
        assert loaded["proven"] == loaded["elements"]["param"] > 0
    assert sum("proven to be the model's weights" in line for line in found["lines"]) == len(
        found["report"]["optimizers"]
    )
    RAN.append(name)


@pytest.mark.ranks
def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 13
    assert (
        len(RAN) == len(set(RAN)) == chosen(request, test_every_master_weight_of_a_resume_is_proven)
    )


def refusals(ext: RankPool, world: int, **kwargs: Any) -> list[dict[str, Any]]:
    """The error of each rank, none of which waits for another."""
    found = ext.run("tests.support.policies:refused", world, policies=["{}"], **kwargs)
    errors = [error for (error,) in found]
    assert all(error["where"] == "load" and error["in step"] for error in errors)
    return errors


#: Formats that know parameters by position, on one rank and on two.
BY_POSITION = {
    "dp_reshardable": BF16,
    "legacy": replace(BF16, format="torch"),
    "not distributed, legacy": replace(BF16, distributed=False, format="torch"),
}


@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", BY_POSITION)
def test_state_of_another_layer_is_refused_on_every_rank(
    name: str, world: int, ext: RankPool, checkpoints: Checkpoints
) -> None:
    """Phase 1 trains layer 0, phase 2 layer 1, which has the same sizes."""
    layout = BY_POSITION[name]
    directory, _ = checkpoints.phase_1(replace(layout, trained=r"layers\.0\."), world)
    found = refusals(
        ext,
        world,
        layout=replace(layout, trained=r"layers\.1\."),
        hyper=SECOND,
        directory=directory,
    )
    for error in found:
        assert error["type"] in ("CheckpointError", "AgreementError")
        assert "master weights are not the weights that the model has loaded" in error["message"]
        assert "decoder.layers.1." in error["message"]
        assert "--selective-master-weights model" in error["message"]
    # A rank names what it holds a part of.
    assert any("decoder.layers.1.mlp.linear_fc1.weight: " in e["message"] for e in found)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("what", "noticed"), [("master", True), ("weight", True), ("exp_avg", False)]
)
def test_a_flipped_bit_of_a_weight_is_noticed(
    what: str, noticed: bool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    """A moment has no second copy to compare it with."""
    directory, _ = checkpoints.phase_1(BF16, 1)
    (error,) = ext.run(
        "tests.support.proof_cases:flipped",
        1,
        layout=BF16,
        hyper=SECOND,
        directory=directory,
        what=what,
    )
    assert error["type"] == ("CheckpointError" if noticed else "")
    if noticed:
        assert ".weight: 1 of " in error["message"] or ".bias: 1 of " in error["message"]


@pytest.mark.ranks
@pytest.mark.parametrize("form", ["dp_reshardable", "fully_reshardable", "torch"])
def test_a_load_waits_for_the_device_once(
    form: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    """However many parameters there are."""
    counts = []
    for layers in (2, 4):
        layout = replace(BF16, format=form, layers=layers)
        directory, _ = checkpoints.phase_1(layout, 1)
        run: dict[str, Any] = dict(layout=layout, hyper=SECOND, directory=directory)
        (found,) = ext.run("tests.support.proof_cases:waits", 1, **run)
        counts.append(found)
    assert [waits for _, waits in counts] == [1, 1]
    assert 20 < counts[0][0] < counts[1][0]


@pytest.mark.ranks
@pytest.mark.parametrize("number", ["0", "1", "3"])
def test_whole_numbers_are_no_remainders_where_others_are_master_weights(
    number: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    """Norms of another place are all 1, and shifted state ends in zeros."""
    directory, _ = checkpoints.phase_1(BF16, 1)
    at = {"layout": BF16, "hyper": SECOND, "directory": directory}
    (error,) = ext.run("tests.support.proof_cases:flipped", 1, **at, what=number)
    assert error["type"] == "CheckpointError"
    assert "the checkpoint's master weights are not the weights" in error["message"]


@pytest.mark.ranks
@pytest.mark.parametrize(
    "layout",
    [
        BF16,
        replace(BF16, format="torch"),
        replace(BF16, format="fully_reshardable", dtype="fp16"),
        replace(BF16, distributed=False),
    ],
    ids=["dp_reshardable", "legacy", "fp16", "not distributed"],
)
def test_edited_weights_are_refused_or_give_the_master_weights(
    layout: Layout, stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    directory, second = str(tmp_path / "phase1"), str(tmp_path / "phase2")
    run: dict[str, Any] = {"layout": layout, "hyper": FIRST}
    saved = stock.run(
        "tests.support.proof_stock:edited", 2, steps=STEPS, directory=directory, **run
    )
    errors = refusals(ext, 2, directory=directory, **run)
    assert {e["type"] for e in errors} <= {"CheckpointError", "AgreementError"}
    assert all("linear_fc1.weight: " in e["message"] for e in errors)
    assert not any("linear_proj.weight: " in e["message"] for e in errors)

    expected = stock.run(
        "tests.support.proof_stock:corrected", 2, directory=directory, more=MORE, **run
    )
    run["policy"] = {"master_weights": "model"}
    found = resume(ext, 2, directory, more=MORE, save_to=second, **run)
    for ours, theirs, before in zip(found, expected, saved, strict=True):
        assert_same_state(ours["loaded"], theirs["loaded"])
        for one, other in zip(ours["loaded"]["shards"], before["shards"], strict=True):
            np.testing.assert_array_equal(one["exp_avg"], other["exp_avg"])
        assert ours["losses"] == theirs["losses"]
        assert_same_state(ours["final"], theirs["final"])
        assert ours["report"]["optimizers"][0]["loaded"]["proven"] == 0
    # Once: a restart of the phase keeps the low bits of its own master weights.
    again = resume(ext, 2, second, more=0, **run)
    for restarted, ended in zip(again, found, strict=True):
        assert restarted["report"]["phase"]["state"] == "continued"
        assert_same_state(restarted["loaded"], ended["final"])
        assert restarted["report"]["optimizers"][0]["loaded"]["proven"] > 0


@pytest.mark.ranks
def test_stock_loads_the_state_of_another_layer(stock: RankPool, checkpoints: Checkpoints) -> None:
    """The behaviour of upstream that this is for."""
    directory, saved = checkpoints.phase_1(replace(BF16, trained=r"layers\.0\."), 1)
    (found,) = stock.run(
        "tests.support.oracle:stock_resume",
        1,
        layout=replace(BF16, trained=r"layers\.1\."),
        hyper=FIRST,
        directory=directory,
        more=0,
    )
    assert not isinstance(found, Failure)
    assert_same_state(found["loaded"], saved[0])
