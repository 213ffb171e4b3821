"""Stock Megatron-Bridge: what its runs do without this package, on which the others build."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.bridge_runs import GLOBAL_BATCH, Bridge
from tests.support.pool import Failure, RankPool

pytestmark = pytest.mark.ranks

TRAIN = "tests.support.bridge_runs:train"


def test_bridge_trains_saves_and_resumes(bridge: RankPool, tmp_path: Path) -> None:
    saved = bridge.run(TRAIN, 2, run=Bridge(3, save=str(tmp_path)))
    resumed = bridge.run(TRAIN, 2, run=Bridge(5, load=str(tmp_path)))
    for before, after in zip(saved, resumed, strict=True):
        assert after["begin"]["class"] == "DistributedOptimizer"
        assert [s["iteration"] for s in after["steps"]] == [3, 4]
        assert [s["consumed"] for s in after["steps"]] == [3 * GLOBAL_BATCH, 4 * GLOBAL_BATCH]
        assert len(before["end"]["moments"]) > 10
        for one, other in zip(before["end"]["moments"], after["begin"]["moments"], strict=True):
            assert all((one[key] == other[key]).all() for key in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("reshardable", [False, True])
def test_bridge_cannot_resume_with_another_learning_rate(
    bridge: RankPool, tmp_path: Path, reshardable: bool
) -> None:
    bridge.run(TRAIN, 1, run=Bridge(1, save=str(tmp_path), reshardable=reshardable))
    second = Bridge(2, load=str(tmp_path), lr=1e-3, reshardable=reshardable)
    (failure,) = bridge.run(TRAIN, 1, run=second, allow_failure=True)
    assert isinstance(failure, Failure)
    assert failure.type == "KeyError"
    assert "0.001" in failure.message


def test_bridge_keeps_the_betas_of_the_checkpoint(bridge: RankPool, tmp_path: Path) -> None:
    bridge.run(TRAIN, 1, run=Bridge(1, save=str(tmp_path)))
    second = Bridge(2, load=str(tmp_path), changes={"optimizer.adam_beta2": 0.9})
    (stock,) = bridge.run(TRAIN, 1, run=second)
    (ours,) = bridge.run(TRAIN, 1, run=second, resume={})
    assert {g["betas"] for g in stock["begin"]["groups"]} == {(0.9, 0.999)}
    assert {g["betas"] for g in ours["begin"]["groups"]} == {(0.9, 0.9)}
