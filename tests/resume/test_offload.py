"""CPU offload (HybridDeviceOptimizer), whose state is on two devices."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.version import Version

from tests.conftest import STEPS
from tests.support.cells import chosen
from tests.support.harness import Layout
from tests.support.offload_stock import HYPER
from tests.support.pool import RankPool

CASES, STOCK = "tests.support.offload_cases", "tests.support.offload_stock"
OFFLOAD = Layout(adam="offload")
OVERLAPPED = replace(OFFLOAD, adam="overlapped offload")
FULL, LEGACY = {"format": "fully_reshardable"}, {"format": "torch"}
LAYOUTS: dict[str, tuple[Layout, int]] = {
    "dp 1": (OFFLOAD, 1),
    "dp 2, fully_reshardable": (replace(OFFLOAD, **FULL), 2),
    "dp 2, legacy": (replace(OFFLOAD, **LEGACY), 2),
    "overlapped, dp 2": (OVERLAPPED, 2),
    "overlapped, dp 1, fully_reshardable": (replace(OVERLAPPED, **FULL), 1),
    "overlapped, dp 1, legacy": (replace(OVERLAPPED, **LEGACY), 1),
}
#: Policy -> what it does to exp_avg and exp_avg_sq.
POLICIES = {
    "preset: reset": (0.0, 0.0),
    "{moments: [{match: '*', exp_avg: scale 0.5, exp_avg_sq: scale 0.25}]}": (0.5, 0.25),
}

RAN: list[tuple[Layout, int]] = []

pytestmark = [pytest.mark.ranks]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    pairs = list(zip(one["shards"], other["shards"], strict=True))
    assert pairs
    equal = all(np.array_equal(a[key], b[key]) for a, b in pairs for key in a)
    return equal and one["same"] and other["same"] and one["weights"] == other["weights"]


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def phase_1(
    request: pytest.FixtureRequest,
    stock: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
    megatron: Version,
) -> tuple[dict[str, Any], int, list[dict[str, Any]]]:
    if megatron < Version("0.17"):
        pytest.skip("its OptimizerConfig asks for the version of TE, which is not installed")
    layout, world = LAYOUTS[request.param]
    directory = str(tmp_path_factory.mktemp("offload") / "phase1")
    at = {"layout": layout, "directory": directory}
    return at, world, stock.run(f"{STOCK}:phase_1", world, **at)


def legacy(at: dict[str, Any]) -> bool:
    return bool(at["layout"].format == "torch")


@pytest.mark.matrix
def test_a_resume_goes_on_as_one_process(phase_1: Any, ext: RankPool) -> None:
    at, world, uninterrupted = phase_1
    ours = ext.run(f"{CASES}:resumed", world, **at, policy="{}")
    for rank, expected in zip(ours, uninterrupted, strict=True):
        assert same(rank["loaded"], expected["saved"])
        assert same(rank["trained"], expected["trained"])
        assert rank["losses"] == expected["losses"][3:]
        assert rank["steps"] == {"cpu": [6], "device": [6]}
    RAN.append((at["layout"], world))


def test_stock_stops_counting_on_the_device(phase_1: Any, stock: RankPool) -> None:
    """Why it is not compared with stock; if this fails, upstream has mended it."""
    at, world, uninterrupted = phase_1
    for rank, expected in zip(
        stock.run(f"{STOCK}:changed_by_hand", world, **at, factors=(1.0, 1.0)),
        uninterrupted,
        strict=True,
    ):
        assert rank["steps"]["device"] == [4]
        assert not same(rank["trained"], expected["trained"])


@pytest.mark.parametrize("phase_1", [n for n in LAYOUTS if "legacy" in n], indirect=True)
def test_stock_loses_the_weights_of_a_legacy_checkpoint(phase_1: Any, stock: RankPool) -> None:
    """Why its loss jumps (issue #1842 of Megatron-LM); if this fails, upstream has mended it."""
    at, world, uninterrupted = phase_1
    loads = stock.run(f"{STOCK}:changed_by_hand", world, **at, factors=(1.0, 1.0))
    for rank, expected in zip(loads, uninterrupted, strict=True):
        assert rank["loaded"]["weights"] != expected["saved"]["weights"]
        assert not rank["loaded"]["same"]
        # A random step from the weights of the initialisation, so that it begins where that did.
        loss, initial, saved = rank["losses"][0], expected["losses"][0], expected["losses"][3]
        assert abs(loss - initial) < abs(loss - saved) > 0.05


@pytest.mark.parametrize("policy", POLICIES)
def test_rules_make_what_a_loop_makes(
    policy: str, phase_1: Any, ext: RankPool, stock: RankPool
) -> None:
    at, world, phase = phase_1
    at_load = ext.run(f"{CASES}:resumed", world, **at, policy=policy)
    live = ext.run(f"{CASES}:changed_live", world, **at, policy=policy, ours=True)
    found = [at_load, live]
    if legacy(at):  # which stock cannot load
        by_hand = [multiplied(rank["saved"], POLICIES[policy]) for rank in phase]
    else:
        loads = stock.run(f"{STOCK}:changed_by_hand", world, **at, factors=POLICIES[policy])
        by_hand = [rank["loaded"] for rank in loads]
        found.append(ext.run(f"{CASES}:changed_live", world, **at, policy=policy, ours=False))
    step = 3 if policy == "preset: reset" else 6
    for rank, expected in enumerate(by_hand):
        for one in found:
            assert same(one[rank]["loaded"], expected)
        # What stock has loaded counts its steps right only after they were set to 0.
        for one in found if step == 3 else found[:2]:
            assert one[rank]["steps"] == {"cpu": [step], "device": [step]}
            assert same(one[rank]["trained"], at_load[rank]["trained"])


def multiplied(state: dict[str, Any], factors: tuple[float, float]) -> dict[str, Any]:
    by_key = {"master_param": 1.0, "exp_avg": factors[0], "exp_avg_sq": factors[1]}
    shards = [{k: v * np.float32(by_key[k]) for k, v in one.items()} for one in state["shards"]]
    return {**state, "shards": shards}


@pytest.mark.parametrize("adam", ["offload", "overlapped offload"])
@pytest.mark.parametrize("world", [1, 2])
def test_new_rows_stay_as_initialised(
    adam: str, world: int, stock: RankPool, ext: RankPool, tmp_path: Path, megatron: Version
) -> None:
    if megatron < Version("0.17"):
        pytest.skip("its OptimizerConfig asks for the version of TE, which is not installed")
    small = Layout(adam=adam, format="fully_reshardable", vocab=40, hidden=20)
    large = replace(small, vocab=50)
    run: dict[str, Any] = dict(hyper=HYPER, directory=str(tmp_path / "phase1"))
    vocabulary = "tests.support.vocabulary_stock"
    (before, *_) = stock.run(f"{vocabulary}:phase_1", 1, layout=small, steps=STEPS, **run)
    (fresh, *_) = stock.run(f"{vocabulary}:fresh", world, layout=large, hyper=HYPER)
    policies = {"keep": "{}"}
    resumed = "tests.support.vocabulary:resumed"
    (found, *_) = ext.run(resumed, world, layout=large, policies=policies, steps=1, **run)
    ours = found["keep"]
    grown = 0
    for name, tensors in before["state"].items():
        rows = len(tensors["param"])
        grown += len(fresh["state"][name]["param"]) > rows
        wanted = np.concatenate([tensors["param"], fresh["state"][name]["param"][rows:]])
        np.testing.assert_array_equal(ours["state"][name]["param"], wanted, err_msg=name)
        weights = np.concatenate([before["weights"][name], fresh["weights"][name][rows:]])
        np.testing.assert_array_equal(ours["weights"][name], weights, err_msg=name)
        for key in ("exp_avg", "exp_avg_sq"):
            assert not ours["state"][name][key][rows:].any()
            np.testing.assert_array_equal(ours["state"][name][key][:rows], tensors[key])
    assert grown == 2
    # A parameter that one step has moved by the learning rate, and not to another weight.
    trained = ours["trained"]["state"]
    for name, tensors in ours["state"].items():
        moved = np.abs(trained[name]["param"] - tensors["param"]).max()
        assert 0 < moved < 10 * HYPER.lr, name


def test_the_optimizer_is_the_real_one(phase_1: Any) -> None:
    at, _, ranks = phase_1
    assert "offload" in at["layout"].adam
    assert all(rank["saved"]["shards"] for rank in ranks)
    assert Path(at["directory"], "metadata.json").is_file() != legacy(at)


def test_every_layout_ran(request: pytest.FixtureRequest, megatron: Version) -> None:
    if megatron >= Version("0.17"):
        assert len(LAYOUTS) == 6
        assert len(RAN) == len(set(RAN)) == chosen(request, test_a_resume_goes_on_as_one_process)
