"""A resume with other hyperparameters equals stock Megatron with the groups corrected by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.conftest import FIRST, STEPS, Checkpoints
from tests.support.cells import of_every_version, with_all
from tests.support.harness import Hyper, Layout
from tests.support.pool import RankPool

SECOND = Hyper(
    lr=1e-3,
    min_lr=1e-4,
    weight_decay=0.05,
    betas=(0.8, 0.9),
    eps=1e-6,
    train_iters=60,
    warmup_iters=3,
)
MORE = 5

BF16 = Layout()
MOE = Layout(experts=4, ep=2)

# Same layout before and after: the oracle is an uninterrupted process.
SAME = {
    "dp1": (BF16, 1),
    "dp2": (BF16, 2),
    "dp4": (BF16, 4),
    "dp2-overlap": (replace(BF16, overlap=True), 2),
    "dp2-fully_reshardable": (replace(BF16, format="fully_reshardable"), 2),
    "dp2-legacy": (replace(BF16, format="torch"), 2),
    "fp32-dp2": (replace(BF16, dtype="fp32"), 2),
    "fp32-dp2-fully_reshardable": (replace(BF16, dtype="fp32", format="fully_reshardable"), 2),
    "fp32-dp2-legacy": (replace(BF16, dtype="fp32", format="torch"), 2),
    "adamw-dp2": (replace(BF16, adam="torch"), 2),
    "adamw-dp2-fully_reshardable": (replace(BF16, adam="torch", format="fully_reshardable"), 2),
    "adamw-dp2-legacy": (replace(BF16, adam="torch", format="torch"), 2),
    "adamw-fp32-dp1": (replace(BF16, adam="torch", dtype="fp32"), 1),
    "tp2": (replace(BF16, tp=2), 2),
    "tp2-legacy": (replace(BF16, tp=2, format="torch"), 2),
    "tp2-dp2-fully_reshardable": (replace(BF16, tp=2, format="fully_reshardable"), 4),
    "pp2-vpp2": (replace(BF16, pp=2, vpp=2), 2),
    "moe-ep2": (MOE, 2),
    "moe-ep2-dp2-fully_reshardable": (replace(MOE, format="fully_reshardable"), 4),
    "moe-ep2-legacy": (replace(MOE, format="torch"), 2),
    "moe-ep2-adamw": (replace(MOE, adam="torch"), 2),
    "instances2": (replace(BF16, instances=2), 2),
    "replicated-bf16": (replace(BF16, distributed=False), 2),
    "replicated-bf16-legacy": (replace(BF16, distributed=False, format="torch"), 2),
    "replicated-fp32": (replace(BF16, distributed=False, dtype="fp32"), 2),
    "replicated-fp32-legacy": (replace(BF16, distributed=False, dtype="fp32", format="torch"), 2),
    "replicated-bf16-adamw": (replace(BF16, distributed=False, adam="torch"), 1),
    "replicated-moe": (replace(MOE, distributed=False), 2),
}

#: Run without --all too. `test_matrix.py` has every layout, format and dtype, in pairs.
CHOSEN = {
    "dp2-overlap",
    "fp32-dp2",
    "adamw-dp2-fully_reshardable",
    "tp2-legacy",
    "moe-ep2-dp2-fully_reshardable",
    "replicated-bf16",
}

# Another layout after: the oracle is stock, loaded in the new layout with phase 1's arguments.
OTHER = {
    "dp2-to-dp1": (BF16, 2, BF16, 1),
    "dp2-to-dp4": (BF16, 2, BF16, 4),
    "tp1-to-tp2": (
        replace(BF16, format="fully_reshardable"),
        2,
        replace(BF16, format="fully_reshardable", tp=2),
        2,
    ),
    "dp2-to-dp1-fully_reshardable": (
        replace(BF16, format="fully_reshardable"),
        2,
        replace(BF16, format="fully_reshardable"),
        1,
    ),
    "dp2-to-dp1-legacy": (replace(BF16, format="torch"), 2, replace(BF16, format="torch"), 1),
}


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every shard of every tensor bit for bit, and the step."""
    assert found["steps"] == expected["steps"]
    assert len(found["shards"]) == len(expected["shards"]) > 0
    for ours, theirs in zip(found["shards"], expected["shards"], strict=True):
        assert set(ours) == set(theirs) == {"param", "exp_avg", "exp_avg_sq"}
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def assert_worth_comparing(state: dict[str, Any]) -> None:
    """The moments are neither zero nor uniform."""
    assert state["steps"] == [STEPS]
    for key in ("exp_avg", "exp_avg_sq"):
        values = np.concatenate([shard[key] for shard in state["shards"]], axis=None)
        assert np.count_nonzero(values) > values.size / 4
        assert np.unique(values).size > values.size / 8


@pytest.mark.ranks
@pytest.mark.parametrize("name", with_all(SAME, CHOSEN))
def test_equals_an_uninterrupted_run(
    name: str, stock: RankPool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    layout, world = SAME[name]
    directory, saved = checkpoints.phase_1(layout, world)
    expected = stock.run(
        "tests.support.oracle:uninterrupted",
        world,
        layout=layout,
        first=FIRST,
        second=SECOND,
        steps=STEPS,
        more=MORE,
    )
    found = ext.run(
        "tests.support.subject:resume",
        world,
        layout=layout,
        hyper=SECOND,
        directory=directory,
        more=MORE,
    )
    for rank in range(world):
        assert_worth_comparing(saved[rank])
        assert_same_state(found[rank]["loaded"], saved[rank])
        assert_same_run(found[rank], expected[rank])


@pytest.mark.ranks
@pytest.mark.parametrize("name", of_every_version(OTHER, ["tp1-to-tp2"]))
def test_equals_stock_with_corrected_groups(
    name: str, stock: RankPool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    before, world_before, after, world = OTHER[name]
    directory, saved = checkpoints.phase_1(before, world_before)
    expected = stock.run(
        "tests.support.oracle:corrected_load",
        world,
        layout=after,
        first=FIRST,
        second=SECOND,
        directory=directory,
        more=MORE,
    )
    found = ext.run(
        "tests.support.subject:resume",
        world,
        layout=after,
        hyper=SECOND,
        directory=directory,
        more=MORE,
    )
    assert_worth_comparing(saved[0])
    for rank in range(world):
        assert_same_state(found[rank]["loaded"], expected[rank]["loaded"])
        assert_same_run(found[rank], expected[rank])


def assert_same_run(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, learning rates, weight decay and the state after the last step, exactly."""
    assert len(expected["losses"]) == MORE
    assert found["lrs"] == expected["lrs"]
    assert found["wds"] == expected["wds"]
    assert found["losses"] == expected["losses"]
    assert_same_state(found["final"], expected["final"])
    for ours, theirs in zip(found["final"]["weights"], expected["final"]["weights"], strict=True):
        np.testing.assert_array_equal(ours, theirs)
