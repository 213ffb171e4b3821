"""A model that changes between two runs of Megatron's own training loop."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version

from tests.support.runs import Runs, Scenario, needs_training, ok, runs_of
from tests.support.training import Zygote

pytestmark = [pytest.mark.e2e, needs_training]

SCRIPT = "tests/support/model_script.py"
PHASE = (
    "--bf16 --lr 3e-4 --lr-decay-iters 20 --override-opt_param-scheduler --ckpt-format torch_dist"
)
FULL = f"{PHASE} --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable"
FIRST, SECOND = "--train-iters 4", "--train-iters 6"
OURS = "--optimizer-class megatron_ext.SelectiveAdam --selective-report {report}"
GPT = "--position-embedding-type rope --no-rope-fusion --untie-embeddings-and-output-weights"
LAYER_0, LAYER_1 = {"TRAINED": r"layers\.0\."}, {"TRAINED": r"layers\.1\."}
OUTPUT = {"TRAINED": "^output_layer"}
HEAD = (
    f"{FULL} {OURS} --untie-embeddings-and-output-weights --pipeline-model-parallel-size 2 "
    "--tensor-model-parallel-size 1"
)


def scenario(arguments: str, loads: str | None = None, **kwargs: Any) -> Scenario:
    return Scenario(f"{arguments} --tensorboard-dir {{report}}", loads, script=SCRIPT, **kwargs)


SCENARIOS = {
    "layer 0": scenario(f"{FULL} {OURS} {FIRST}", saves=True, env=LAYER_0),
    "layer 0, stock": scenario(f"{FULL} {SECOND}", "layer 0", env=LAYER_0),
    "layer 1": scenario(
        f"{FULL} {OURS} {SECOND} --selective-new-parameters decoder.layers.1.*",
        "layer 0",
        env=LAYER_1,
        saves=True,
    ),
    "layer 1 again": scenario(
        f"{FULL} {OURS} --train-iters 8 --selective-new-parameters decoder.layers.1.*",
        "layer 1",
        env=LAYER_1,
    ),
    "head": scenario(f"{HEAD} {FIRST}", saves=True, env=OUTPUT, world=2),
    "head, unbroken": scenario(f"{HEAD} {SECOND}", env=OUTPUT, world=2),
    "head again": scenario(f"{HEAD} --train-iters 5", "head", saves=True, env=OUTPUT, world=2),
    "head, third": scenario(f"{HEAD} {SECOND}", "head again", env=OUTPUT, world=2),
    "plain": scenario(f"{PHASE} {FIRST}", saves=True),
    "plain, stock": scenario(f"{PHASE} {SECOND}", "plain"),
    "distributed on": scenario(f"{FULL} {OURS} {SECOND}", "plain"),
    "full": scenario(f"{FULL} {FIRST}", saves=True),
    "full, stock": scenario(f"{FULL} {SECOND}", "full"),
    "distributed off": scenario(f"{PHASE} {OURS} {SECOND}", "full"),
    "gpt": scenario(f"{FULL} {GPT} {FIRST}", saves=True),
    "hybrid": scenario(
        f"{FULL} {GPT} {OURS} {SECOND} --hybrid-layer-pattern M*-M*-", "gpt", env={"HYBRID": "1"}
    ),
    "hybrid, finetuned": scenario(
        f"{FULL} {GPT} {OURS} --train-iters 2 --hybrid-layer-pattern M*-M*- --finetune",
        "gpt",
        env={"HYBRID": "1"},
    ),
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Runs]:
    yield from runs_of(SCENARIOS, request, tmp_path_factory.mktemp("runs"), zygote)


def dump(runs: Runs, name: str, when: str) -> dict[str, Any]:
    ok(runs[name])
    found: dict[str, Any] = torch.load(runs.checkpoint(name).parent / f"{when}.pt")
    return found


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted) == {"param", "exp_avg", "exp_avg_sq"}
    for key, value in found.items():
        assert torch.equal(value, wanted[key]), key


@pytest.mark.reads("layer 0", "layer 0, stock")
def test_layers_of_which_some_are_frozen_are_saved_as_an_ordinary_checkpoint(runs: Runs) -> None:
    saved, loaded = dump(runs, "layer 0", "after"), dump(runs, "layer 0, stock", "before")
    assert {name.split(".")[2] for name in saved["state"]} == {"0"}
    assert set(loaded["state"]) == set(saved["state"])
    for name, state in loaded["state"].items():
        assert_equal(state, saved["state"][name])
    for name, weight in loaded["weights"].items():
        assert torch.equal(weight, saved["weights"][name]), name
    assert sorted(runs["layer 0, stock"].iterations) == [5, 6]


@pytest.mark.reads("layer 0", "layer 1", "layer 1 again")
def test_another_layer_is_trained_on(runs: Runs) -> None:
    saved, loaded = dump(runs, "layer 0", "after"), dump(runs, "layer 1", "before")
    for name, weight in loaded["weights"].items():
        assert torch.equal(weight, saved["weights"][name]), name
    assert {name.split(".")[2] for name in loaded["state"]} == {"1"}
    for name, state in loaded["state"].items():
        assert torch.equal(state["param"], saved["weights"][name].flatten())
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
    report = runs["layer 1"].report
    assert report is not None
    assert {one["name"] for one in report["parameters"]["new"]} == set(loaded["state"])
    assert {one["name"] for one in report["parameters"]["left"]} == set(saved["state"])
    after, again = dump(runs, "layer 1", "after"), dump(runs, "layer 1 again", "before")
    for name, state in again["state"].items():
        assert_equal(state, after["state"][name])
    assert sorted(runs["layer 1 again"].iterations) == [7, 8]


@pytest.mark.reads("head", "head, unbroken", "head again", "head, third")
def test_the_step_is_saved_where_the_first_stage_trains_nothing(runs: Runs) -> None:
    unbroken = ok(runs["head, unbroken"]).iterations
    assert ok(runs["head again"]).iterations == {5: unbroken[5]}
    assert ok(runs["head, third"]).iterations == {6: unbroken[6]}
    for name, step in (("head again", 4), ("head, third", 5)):
        report = runs[name].report
        assert report is not None
        assert report["optimizers"][0]["step"]["value"] == step


@pytest.mark.parametrize(
    ("before", "after", "stock"),
    [
        pytest.param(*names, marks=pytest.mark.reads(*names))
        for names in (
            ("plain", "distributed on", "plain, stock"),
            ("full", "distributed off", "full, stock"),
        )
    ],
)
def test_the_distributed_optimizer_is_turned_on_and_off(
    before: str, after: str, stock: str, runs: Runs
) -> None:
    saved, loaded = dump(runs, before, "after"), dump(runs, after, "before")
    assert set(saved["state"]) == set(loaded["state"])
    for name, state in loaded["state"].items():
        assert_equal(state, saved["state"][name])
    assert runs[after].iterations == ok(runs[stock]).iterations
    assert sorted(runs[after].iterations) == [5, 6]


#: HybridModel's layers for the pattern M*-M*- -> those of the GPT.
GPT_LAYERS = {"1": "0", "2": "0", "4": "1", "5": "1"}


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(name, marks=pytest.mark.reads("gpt", name))
        for name in ("hybrid", "hybrid, finetuned")
    ],
)
def test_a_gpt_goes_on_as_a_hybrid_model_with_new_layers(
    run: str, runs: Runs, megatron: Version
) -> None:
    if megatron < Version("0.19"):
        pytest.skip("Megatron loads a GPT into a HybridModel from 0.19 on")
    saved, loaded = dump(runs, "gpt", "after"), dump(runs, run, "before")
    seen = {"new": 0, "old": 0}
    for name, state in loaded["state"].items():
        words = name.replace("final_norm.", "final_layernorm.").split(".")
        layer = words[2] if words[1] == "layers" else None
        if layer in ("0", "3"):
            assert torch.equal(state["param"], loaded["weights"][name].flatten()), name
            assert not state["exp_avg"].any()
            assert not state["exp_avg_sq"].any()
            seen["new"] += bool(state["param"].any())
            continue
        if layer is not None:
            words[2] = GPT_LAYERS[layer]
        assert_equal(state, saved["state"][".".join(words)])
        seen["old"] += 1
    assert seen["old"] == len(saved["state"])
    assert seen["new"] >= 6
    report = runs[run].report
    assert report is not None
    new = {one["name"]: one["elements"] for one in report["parameters"]["new"]}
    assert new == {
        name: state["param"].numel()
        for name, state in loaded["state"].items()
        if ".layers.0." in name or ".layers.3." in name
    }
    assert any("new parameters" in one for one in report["optimizers"][0]["warnings"])
    assert "moments are dropped" not in runs[run].log
    assert ("Megatron loads a GPT's optimizer state" in runs[run].log) == ("finetuned" in run)
    after = dump(runs, run, "after")
    for name, weight in after["weights"].items():
        change = (weight - loaded["weights"][name]).abs().max()
        assert change < 3e-3, name  # a lost master weight sets it to nearly 0
