"""`megatron_ext.enable` in hosts that read checkpoints themselves."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FIRST, STEPS, Checkpoints
from tests.support.harness import Hyper, Layout
from tests.support.pool import RankPool

ROOT = Path(__file__).resolve().parents[2]
CASES = "tests.support.enabled_cases"
SECOND = replace(FIRST, lr=1e-3, min_lr=1e-4)
LAYOUTS = {
    "dp_reshardable": Layout(),
    "fully_reshardable": Layout(format="fully_reshardable"),
    "fully parallel load": Layout(format="fully_reshardable", parallel_load=True),
    "not distributed": Layout(distributed=False),
}

pytestmark = [pytest.mark.ranks]


def phase_2(
    checkpoints: Checkpoints, layout: Layout, hyper: Hyper = SECOND
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    directory, saved = checkpoints.phase_1(replace(layout, parallel_load=False), 2)
    return {"layout": layout, "hyper": hyper, "directory": directory}, saved


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_builder_that_was_bound_before_resumes_as_stock_corrected_by_hand(
    layout: Layout, checkpoints: Checkpoints, ext: RankPool, stock: RankPool
) -> None:
    at, _ = phase_2(checkpoints, layout)
    found = ext.run(f"{CASES}:resumed", 2, **at, more=2)
    expected = stock.run(
        "tests.support.oracle:corrected_load",
        2,
        layout=layout,
        first=FIRST,
        second=SECOND,
        directory=at["directory"],
        more=2,
    )
    for ours, other in zip(found, expected, strict=True):
        assert ours["lrs"] == other["lrs"]
        assert ours["losses"] == other["losses"]
    assert "guard: 1 step after the load" in found[0]["log"]


@pytest.mark.matrix
def test_a_scheduler_that_is_not_restored_is_said_with_its_learning_rate(
    checkpoints: Checkpoints, ext: RankPool
) -> None:
    at, saved = phase_2(checkpoints, Layout())
    (found, _) = ext.run(f"{CASES}:resumed", 2, **at, scheduler=False)
    last = saved[0]["groups"][0]["lr"]
    assert found["first"] is None
    assert found["lrs"][0][0] == 0.0  # a fresh scheduler's
    assert (
        "WARNING: no OptimizerParamScheduler was loaded with the optimizer: the first step's "
        f"learning rate in param_group 0 is 0.000000E+00 (the checkpoint's last: {last:.6E})"
    ) in found["log"]


def test_a_scheduler_that_asks_for_the_checkpoints_values_is_told_who_decides(
    checkpoints: Checkpoints, ext: RankPool
) -> None:
    at, _ = phase_2(checkpoints, Layout())
    (found, _) = ext.run(f"{CASES}:resumed", 2, **at, use_checkpoint=True)
    assert "use_checkpoint_opt_param_scheduler=True; the policy decides" in found["log"]
    kept = ext.run(f"{CASES}:resumed", 2, **at, use_checkpoint=True, policy="schedule: checkpoint")
    assert "the policy decides" not in kept[0]["log"]


REFUSED = {
    "without is_loading": ("CheckpointError", "sharded_state_dict was called without is_loading"),
    "no metadata": ("CheckpointError", "without metadata that names the sharding"),
    "no scheduler": ("HostError", "the policy takes the schedule from the checkpoint, and no"),
}


@pytest.mark.parametrize("layout", ["dp_reshardable", "fully_reshardable", "not distributed"])
@pytest.mark.parametrize("how", REFUSED)
def test_what_a_host_does_wrong_is_named_on_every_rank(
    how: str, layout: str, checkpoints: Checkpoints, ext: RankPool
) -> None:
    if (how, layout) == ("no metadata", "not distributed"):
        pytest.skip("its format does not depend on metadata")
    kind, said = REFUSED[how]
    at, _ = phase_2(checkpoints, LAYOUTS[layout])
    for rank in ext.run(f"{CASES}:refused", 2, **at, how=how):
        assert rank["type"] == kind
        assert said in rank["message"]
        assert rank["unchanged"]


def test_two_policies_in_one_process_are_named(ext: RankPool) -> None:
    (found,) = ext.run(f"{CASES}:enabled_twice", 1)
    assert "preset is reset and then reset-momentum" in found["another policy"]
    assert "report_dir is reports and then elsewhere" in found["another directory"]
    assert len(found) == 2


@pytest.mark.matrix
def test_counters_are_the_same_on_every_rank_and_in_the_mark(
    checkpoints: Checkpoints, ext: RankPool
) -> None:
    at, _ = phase_2(checkpoints, Layout())
    for rank in ext.run(f"{CASES}:counters_agree", 2, **at):
        assert (rank["counters"].iteration, rank["counters"].consumed_train_samples) == (0, 32)
        assert rank["again"] == rank["counters"]
        (mark,) = rank["marks"]
        assert json.loads(mark)["offset"] == 8 * STEPS
        assert "the counters" in rank["differs"]
        assert "iteration" in rank["differs"]


def test_the_guides_own_loop_runs_as_it_is_written(
    checkpoints: Checkpoints, ext: RankPool, tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "guide" / "other-frameworks.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    code = [b for b in blocks if "def train(" in b or "def load(" in b]
    assert len(code) == 2
    at, _ = phase_2(checkpoints, Layout())
    for rank in ext.run(
        f"{CASES}:as_in_the_guide", 2, **at, target=str(tmp_path / "phase2"), code=code
    ):
        assert rank["iterations"] == [0, 1, 2, 3]
