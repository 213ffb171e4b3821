"""Two phases with Megatron-Bridge's own `pretrain`: the second is resumed by `resume_with`."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext import Preset, ResumePolicy
from tests.bridge.conftest import FIRST, TRAIN, FirstPhases
from tests.support.bridge_runs import GLOBAL_BATCH, Bridge
from tests.support.pool import Failure, RankPool

pytestmark = pytest.mark.ranks

LOWER = 1e-3
GUARDED = "guard: 1 step after the load the hyperparameters match the plan"


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Whether two lists of moments are equal, bit for bit."""
    pairs = list(zip(one, other, strict=True))
    assert len(pairs) > 10
    return all(a[key].tobytes() == b[key].tobytes() for a, b in pairs for key in a)


def rate(iteration: int, run: Bridge) -> float:
    """The learning rate of the step after `iteration` ones, by the formula of a linear decay."""
    lowest, warm_up = run.lr / 10, 1
    left = 1 - (iteration - warm_up) / (run.decay_iters - warm_up)
    return lowest + (run.lr - lowest) * left


def position(result: dict[str, Any]) -> tuple[int, int]:
    """Iteration and consumed samples before the first step."""
    return result["steps"][0]["iteration"], result["steps"][0]["consumed"]


def test_a_lower_rate_keeps_the_moments_and_stock_bridge_goes_on(
    bridge: RankPool, first: FirstPhases, tmp_path: Path
) -> None:
    cells = []
    layouts = ((1, ""), (2, ""), (2, "tensor"), (2, "pipeline"))
    for (world, parallel), reshardable in itertools.product(layouts, (False, True)):
        cell = (world, parallel, reshardable)
        start, saved = first(world, reshardable, parallel)
        own = str(tmp_path / str(len(cells)))
        same_layout = {"lr": LOWER, "reshardable": reshardable, "parallel": parallel}
        run = Bridge(FIRST + 2, load=start, save=own, **same_layout)
        resumed = bridge.run(TRAIN, world, run=run, resume={})
        # Stock Bridge reads the same directory with the same config.
        more = Bridge(FIRST + 3, load=own, **same_layout)
        stock = bridge.run(TRAIN, world, run=more)
        for before, ours, after in zip(saved, resumed, stock, strict=True):
            assert ours["begin"]["class"] == "SelectiveAdam", cell
            assert after["begin"]["class"] == "DistributedOptimizer", cell
            assert same(before["end"]["moments"], ours["begin"]["moments"]), cell
            assert same(ours["end"]["moments"], after["begin"]["moments"]), cell
            assert not same(ours["begin"]["moments"], ours["end"]["moments"]), cell
            for name, weight in before["end"]["weights"].items():
                assert np.array_equal(weight, ours["begin"]["weights"][name]), (cell, name)
            groups = ours["begin"]["groups"]
            assert {g["max_lr"] for g in groups} == {LOWER}, cell
            assert {g["step"] for g in groups} == {FIRST}, cell
            for number, step in enumerate([*ours["steps"], *after["steps"]]):
                iteration = FIRST + number
                assert step["iteration"] == iteration, cell
                assert step["consumed"] == iteration * GLOBAL_BATCH, cell
                assert step["lr"] == pytest.approx([rate(iteration, run)] * 2), cell
        assert GUARDED in resumed[0]["log"], resumed[0]["log"]
        assert "megatron_ext" not in stock[0]["log"]
        cells.append(cell)
    assert len(cells) == 8


def test_a_reset_is_applied_once(bridge: RankPool, first: FirstPhases, tmp_path: Path) -> None:
    start, _ = first(2)
    policy = ResumePolicy(preset=Preset("reset"))
    asked = {"policy": policy, "start": start, "verify": True, "report_dir": str(tmp_path / "r")}
    own = Bridge(FIRST + 1, load=str(tmp_path / "own"), save=str(tmp_path / "own"), lr=LOWER)
    applied = bridge.run(TRAIN, 2, run=own, resume=asked)
    again = Bridge(FIRST + 2, load=own.load, save=own.save, lr=LOWER)
    continued = bridge.run(TRAIN, 2, run=again, resume=asked)
    assert "megatron_ext: TRANSITION APPLIED" in applied[0]["log"]
    assert "megatron_ext: CONTINUED" in continued[0]["log"]
    for one, other in zip(applied, continued, strict=True):
        assert not any(array.any() for m in one["begin"]["moments"] for array in m.values())
        assert any(array.any() for m in one["end"]["moments"] for array in m.values())
        assert same(one["end"]["moments"], other["begin"]["moments"])
        assert position(one) == (FIRST, FIRST * GLOBAL_BATCH)
        assert position(other) == (FIRST + 1, (FIRST + 1) * GLOBAL_BATCH)
    # Started from its own end, the same phase begins anew.
    end = Bridge(FIRST + 3, save=str(tmp_path / "next"), lr=LOWER)
    anew = bridge.run(TRAIN, 2, run=end, resume={"policy": policy, "start": own.save})
    assert "megatron_ext: TRANSITION APPLIED" in anew[0]["log"]
    report = json.loads((tmp_path / "r" / "resume-report.json").read_text())
    assert report["phase"]["state"] == "continued"
    assert report["scheduler"]["first_step"][0]["lr"] == continued[0]["steps"][0]["lr"][0]


def test_without_start_the_mark_tells_the_phase(
    bridge: RankPool, first: FirstPhases, tmp_path: Path
) -> None:
    start, _ = first(1)
    asked = {"policy": ResumePolicy(preset=Preset("reset"))}
    own = str(tmp_path)
    (applied,) = bridge.run(
        TRAIN, 1, run=Bridge(FIRST + 1, load=start, save=own, lr=LOWER), resume=asked
    )
    (continued,) = bridge.run(
        TRAIN, 1, run=Bridge(FIRST + 2, load=own, save=own, lr=LOWER), resume=asked
    )
    assert "megatron_ext: TRANSITION APPLIED" in applied["log"]
    assert "megatron_ext: CONTINUED" in continued["log"]
    assert same(applied["end"]["moments"], continued["begin"]["moments"])


def test_counters_begin_anew_once(bridge: RankPool, first: FirstPhases, tmp_path: Path) -> None:
    start, saved = first(2)
    policy = ResumePolicy(reset_iteration=True, reset_dataloader=True)
    asked = {"policy": policy, "start": start}
    own = str(tmp_path)
    applied = bridge.run(TRAIN, 2, run=Bridge(2, save=own, lr=LOWER), resume=asked)
    continued = bridge.run(TRAIN, 2, run=Bridge(4, save=own, lr=LOWER), resume=asked)
    for before, one, other in zip(saved, applied, continued, strict=True):
        assert position(one) == (0, 0)
        assert same(before["end"]["moments"], one["begin"]["moments"])
        assert position(other) == (2, 2 * GLOBAL_BATCH)
        assert same(one["end"]["moments"], other["begin"]["moments"])
    assert "iteration        1/       2" in applied[1]["log"]
    assert "megatron_ext: TRANSITION APPLIED" in applied[0]["log"]
    assert "iteration        3/       4" in continued[1]["log"]
    assert "megatron_ext: CONTINUED" in continued[0]["log"]


def test_the_data_position_alone_begins_anew(
    bridge: RankPool, first: FirstPhases, tmp_path: Path
) -> None:
    start, _ = first(1)
    asked = {"policy": ResumePolicy(reset_dataloader=True), "start": start}
    own = str(tmp_path)
    applied = bridge.run(TRAIN, 1, run=Bridge(FIRST + 1, save=own, lr=LOWER), resume=asked)
    continued = bridge.run(TRAIN, 1, run=Bridge(FIRST + 2, save=own, lr=LOWER), resume=asked)
    assert position(applied[0]) == (FIRST, 0)
    assert position(continued[0]) == (FIRST + 1, GLOBAL_BATCH)


def test_the_guard_stops_a_step_that_is_not_the_planned_one(
    bridge: RankPool, first: FirstPhases
) -> None:
    start, _ = first(1)
    run = Bridge(FIRST + 1, load=start, lr=LOWER)
    (failure,) = bridge.run(TRAIN, 1, run=run, resume={}, tamper={"lr": 5.0}, allow_failure=True)
    assert isinstance(failure, Failure)
    assert failure.type == "GuardError"
    (result,) = bridge.run(TRAIN, 1, run=run, resume={"guard": False}, tamper={"lr": 5.0})
    assert "guard" not in result["log"]


def test_a_config_that_was_saved_has_no_trace_of_this_package(
    bridge: RankPool, first: FirstPhases, tmp_path: Path
) -> None:
    start, _ = first(1)
    run = Bridge(FIRST + 1, load=start, save=str(tmp_path), lr=LOWER)
    bridge.run(TRAIN, 1, run=run, resume={})
    (saved,) = tmp_path.glob("iter_*/run_config.yaml")
    assert "custom_manager_class: null" in saved.read_text()
    assert "megatron_ext" not in saved.read_text()


def test_a_checkpoint_without_optimizer_state_is_an_error_with_a_way_out(
    bridge: RankPool, tmp_path: Path
) -> None:
    start = str(tmp_path)
    first = Bridge(1, save=start, changes={"checkpoint.save_optim": False})
    bridge.run(TRAIN, 1, run=first)
    (failure,) = bridge.run(
        TRAIN, 1, run=Bridge(2, load=start, lr=LOWER), resume={}, allow_failure=True
    )
    assert isinstance(failure, Failure)
    assert failure.type == "CheckpointError"
    assert f"checkpoint.load={start}: no optimizer state was loaded" in failure.message
    assert "checkpoint.load_optim to False" in failure.message
    new = Bridge(2, load=start, lr=LOWER, changes={"checkpoint.load_optim": False})
    (result,) = bridge.run(TRAIN, 1, run=new, resume={})
    assert position(result) == (1, GLOBAL_BATCH)


def test_a_release_checkpoint_is_an_error_too(bridge: RankPool, tmp_path: Path) -> None:
    bridge.run(TRAIN, 1, run=Bridge(1, save=str(tmp_path)))
    (tmp_path / "iter_0000001").rename(tmp_path / "release")
    (tmp_path / "latest_train_state.pt").unlink()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    run = Bridge(1, load=str(tmp_path), lr=LOWER)
    (failure,) = bridge.run(TRAIN, 1, run=run, resume={}, allow_failure=True)
    assert isinstance(failure, Failure)
    assert failure.type == "CheckpointError"
    assert "no optimizer state was loaded" in failure.message
