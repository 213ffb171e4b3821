"""Policies in training runs: invariances, refusals, and what a resume with rules costs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import FIRST, STEPS, Checkpoints
from tests.support.harness import Hyper, Layout
from tests.support.pool import RankPool
from tests.support.unsharded import State

pytestmark = pytest.mark.ranks

BF16 = Layout()
MOE = Layout(experts=4, ep=2)
TRAINED = 20


def scaled_runs(
    stock: RankPool, ext: RankPool, checkpoints: Checkpoints, factor: float, clip_grad: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Stock going on as it was, and the same with loss and moments multiplied."""
    first = replace(FIRST, clip_grad=clip_grad)
    directory, _ = checkpoints.phase_1(BF16, 2, first)
    arguments: dict[str, Any] = {"layout": BF16, "directory": directory, "steps": TRAINED}
    plain = stock.run("tests.support.policies_stock:trained", 2, hyper=first, **arguments)[0]
    found = ext.run(
        "tests.support.policies:trained",
        2,
        hyper=replace(first, loss_factor=factor),
        policy=f"preset: gradient-scale {factor}",
        **arguments,
    )[0]
    return plain, found


#: Largest distance of a weight from where stock goes; the weights move by about 0.05.
CLOSE = 2e-3


def farthest(found: State, expected: State) -> float:
    """Largest difference of a weight.

    Without the biases of queries, keys and values: the gradient of a key's bias is rounding noise.
    """
    return max(
        float(np.abs(found[name]["param"] - tensors["param"]).max())
        for name, tensors in expected.items()
        if not name.endswith("linear_qkv.bias")
    )


def test_a_scaled_gradient_gives_the_same_parameters_bit_for_bit(
    stock: RankPool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    plain, found = scaled_runs(stock, ext, checkpoints, 4.0, 0.0)
    assert found["losses"] == [4 * loss for loss in plain["losses"]]
    assert len(found["losses"]) == TRAINED
    for name, tensors in plain["state"].items():
        ours = found["state"][name]
        np.testing.assert_array_equal(ours["param"], tensors["param"], err_msg=name)
        np.testing.assert_array_equal(ours["exp_avg"], 4 * tensors["exp_avg"], err_msg=name)
        np.testing.assert_array_equal(ours["exp_avg_sq"], 16 * tensors["exp_avg_sq"], err_msg=name)
    assert {g["eps"] for g in found["groups"]} == {4e-8}


def test_with_clipping_the_largest_norm_is_scaled_too(
    stock: RankPool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    plain, found = scaled_runs(stock, ext, checkpoints, 3.0, 0.5)
    assert found["clip_grad"] == [1.5]
    assert any("clip_grad: changed to 1.5" in line for line in found["lines"])
    assert farthest(found["state"], plain["state"]) < CLOSE


def test_without_the_scaled_norm_the_run_is_another_one(
    stock: RankPool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    """What the tolerance above has to tell apart."""
    first = replace(FIRST, clip_grad=0.5)
    directory, _ = checkpoints.phase_1(BF16, 2, first)
    arguments: dict[str, Any] = {"layout": BF16, "directory": directory, "steps": TRAINED}
    plain = stock.run("tests.support.policies_stock:trained", 2, hyper=first, **arguments)[0]
    found = ext.run(
        "tests.support.policies:trained",
        2,
        hyper=replace(first, loss_factor=3.0),
        policy="preset: {name: gradient-scale, s: 3, decline: [clip_grad]}",
        **arguments,
    )[0]
    assert found["clip_grad"] == [0.5]
    assert any("clip_grad is declined" in line for line in found["lines"])
    assert farthest(found["state"], plain["state"]) > 4 * CLOSE


def test_a_larger_batch_changes_what_the_preset_says(
    ext: RankPool, checkpoints: Checkpoints
) -> None:
    directory, _ = checkpoints.phase_1(BF16, 2)
    found = ext.run(
        "tests.support.policies:trained",
        2,
        layout=BF16,
        hyper=FIRST,
        directory=directory,
        policy="preset: batch-size 8 16",
        steps=1,
    )[0]
    for group in found["groups"]:
        assert group["max_lr"] == pytest.approx(FIRST.lr * 2**0.5)
        assert group["min_lr"] == pytest.approx(FIRST.min_lr * 2**0.5)
        assert group["betas"] == pytest.approx((0.8, 0.9))
        assert group["eps"] == pytest.approx(1e-8 / 2**0.5)
        assert group["lr"] > FIRST.lr
    text = "\n".join(found["lines"])
    assert "experimental" in text
    assert "max_lr: changed to 0.00424264" in text
    assert "the global batch size goes from 8 to 16" in text


RESETS = {"reset": ([0], 0.0), "reset-momentum": ([STEPS], None)}


@pytest.mark.parametrize("preset", RESETS)
def test_a_reset_resets_step_with_the_moments(
    preset: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    steps, second = RESETS[preset]
    for layout in (BF16, replace(BF16, format="torch"), replace(BF16, adam="torch"), MOE):
        directory, _ = checkpoints.phase_1(layout, 2)
        found = ext.run(
            "tests.support.policies:resumed",
            2,
            layout=layout,
            hyper=FIRST,
            directory=directory,
            policies={preset: f"preset: {preset}"},
        )[0][preset]
        assert found["steps"] == steps
        for tensors in found["state"].values():
            assert not tensors["exp_avg"].any()
            assert tensors["exp_avg_sq"].any() == (second is None)
            assert tensors["param"].any()
        told = [w for w in found["lines"] if "WARNING" in w]
        assert bool(told) == (preset == "reset")


@pytest.mark.matrix
def test_a_rule_may_match_in_one_optimizer_of_a_chain(
    ext: RankPool, checkpoints: Checkpoints
) -> None:
    directory, _ = checkpoints.phase_1(MOE, 2)
    policy = "moments: [{match: 'decoder.layers.*.mlp.experts.local_experts.3.*', exp_avg: reset}]"
    found = ext.run(
        "tests.support.policies:resumed",
        2,
        layout=MOE,
        hyper=FIRST,
        directory=directory,
        policies={"one": policy},
    )[0]["one"]
    for name, tensors in found["state"].items():
        assert tensors["exp_avg"].any() != (".local_experts.3." in name), name


ROWS = "output_layer.weight"

BAD = {
    "two rules meet": (
        "moments: [{match: '*', exp_avg: reset}, {match: 'output_layer.*', exp_avg: reset}]",
        "PlanError",
        ["'*'", "'output_layer.*'", "output_layer.weight"],
    ),
    "rows out of range": (
        f"moments: [{{match: '{ROWS}[64:]', exp_avg: reset}}]",
        "PlanError",
        [ROWS, "64", "0:64"],
    ),
    "nothing matches": (
        "moments: [{match: 'encoder.*', exp_avg: reset}]",
        "PlanError",
        [
            "'encoder.*'",
            "Names look like decoder",
            "embedding.word_embeddings.weight",
            "--no-selective-strict",
        ],
    ),
    "bias-consistent with step 0": (
        "{preset: bias-consistent, step: reset}",
        "PlanError",
        ["bias-consistent", "step 0"],
    ),
    "a beta below 0": ("preset: batch-size 8 256", "PlanError", ["k (1 - beta) < 1", "betas"]),
    "unknown key": (
        "hyperparameters: {keep: [beta]}",
        "PlanError",
        ["'beta'", "Did you mean 'betas'?"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_refused_on_every_rank_before_anything_changes(
    name: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    policy, kind, words = BAD[name]
    directory, _ = checkpoints.phase_1(BF16, 2)
    files = _files(directory)
    results = ext.run(
        "tests.support.policies:refused",
        2,
        layout=BF16,
        hyper=FIRST,
        directory=directory,
        policies=[policy],
    )
    assert len(results) == 2
    assert kind in {r["type"] for (r,) in results}
    for (result,) in results:
        assert result["type"] in (kind, "AgreementError")
        for word in words:
            assert word in result["message"]
        assert result["unchanged"]
        assert result["in step"]
    assert _files(directory) == files


def test_policies_that_differ_stop_every_rank_before_the_optimizer_is_built(
    ext: RankPool, checkpoints: Checkpoints
) -> None:
    directory, _ = checkpoints.phase_1(BF16, 2)
    results = ext.run(
        "tests.support.policies:refused",
        2,
        layout=BF16,
        hyper=FIRST,
        directory=directory,
        policies=["preset: reset", "preset: reset-momentum"],
    )
    for (result,) in results:
        assert (result["type"], result["where"]) == ("AgreementError", "build")
        assert "the policy" in result["message"]
        assert result["in step"]


def test_a_rule_that_matches_nothing_may_be_a_warning(
    ext: RankPool, checkpoints: Checkpoints
) -> None:
    directory, _ = checkpoints.phase_1(BF16, 2)
    policy = "{strict: false, moments: [{match: 'encoder.*', exp_avg: reset}]}"
    ((found,), _) = ext.run(
        "tests.support.policies:refused",
        2,
        layout=BF16,
        hyper=FIRST,
        directory=directory,
        policies=[policy],
    )
    assert any("WARNING" in line and "'encoder.*'" in line for line in found["lines"])


SCALE = "moments: [{match: '*', exp_avg: scale 0.5, exp_avg_sq: scale 0.25}]"


@pytest.mark.parametrize("rules", ["", f", {SCALE}"], ids=["kept", "scaled"])
def test_moments_that_are_not_finite(
    rules: str, stock: RankPool, ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    directory, _ = checkpoints.phase_1(BF16, 2)
    target = str(tmp_path / "damaged")
    stock.run(
        "tests.support.policies_stock:damaged",
        2,
        layout=BF16,
        hyper=FIRST,
        directory=directory,
        target=target,
    )
    arguments: dict[str, Any] = {"layout": BF16, "hyper": FIRST, "directory": target}
    results = [
        r
        for (r,) in ext.run(
            "tests.support.policies:refused",
            2,
            policies=[f"{{nonfinite: error{rules}}}"],
            **arguments,
        )
    ]
    assert [r["type"] for r in results] == ["CheckpointError", "AgreementError"]
    for result in results:
        assert result["in step"]
        assert "--selective-nonfinite reset" in result["message"]
        assert result["message"].count(": 1") == 2
        assert "decoder.layers." in result["message"] or "embedding." in result["message"]
    found = {
        choice: ext.run(
            "tests.support.policies:refused",
            2,
            policies=[f"{{nonfinite: {choice}{rules}}}"],
            **arguments,
        )[0][0]
        for choice in ("reset", "keep")
    }
    wrong = {
        choice: sum(
            int((~np.isfinite(t[k])).sum())
            for t in one["state"].values()
            for k in ("exp_avg", "exp_avg_sq")
        )
        for choice, one in found.items()
    }
    assert wrong == {"reset": 0, "keep": 2}
    for one in found.values():
        assert any("2 elements of the moments not finite" in line for line in one["lines"])


def test_where_nothing_but_scaling_is_done_the_moments_are_gone_through_once(
    ext: RankPool, checkpoints: Checkpoints
) -> None:
    directory, _ = checkpoints.phase_1(BF16, 2)
    found = ext.run(
        "tests.support.policies:passes",
        2,
        layout=BF16,
        hyper=FIRST,
        directory=directory,
        policies=[
            "{}",
            f"{{{SCALE}}}",
            "preset: bias-consistent",
            "preset: reset",
            "moments: [{match: '*', exp_avg: keep, exp_avg_sq: floor 1e-12}]",
            f"{{nonfinite: keep, {SCALE}}}",
        ],
    )
    assert found == [[1, 1, 1, 2, 2, 2]] * 2


def test_transform_moments_refuses_what_is_no_rule_for_moments(
    ext: RankPool, checkpoints: Checkpoints
) -> None:
    directory, _ = checkpoints.phase_1(BF16, 2)
    arguments: dict[str, Any] = {"layout": BF16, "hyper": FIRST, "directory": directory}
    for policy, word in [
        ("hyperparameters: {keep: [betas]}", "moments and step only"),
        ("{}", "keeps everything"),
    ]:
        for result in ext.run("tests.support.policies:live_refused", 2, policy=policy, **arguments):
            assert result["type"] == "PolicyError"
            assert word in result["message"]
            assert result["in step"]


def test_collectives_of_a_load_with_rules(ext: RankPool, checkpoints: Checkpoints) -> None:
    """Reads, beginning, agreement, gather, counts; one for all means, three for quantiles."""
    directory, _ = checkpoints.phase_1(BF16, 2)
    arguments: dict[str, Any] = {"layout": BF16, "hyper": FIRST, "directory": directory}

    def seen(policy: str) -> list[str]:
        return ext.run("tests.support.policies:reductions", 2, policy=policy, **arguments)[0]

    report = (2 * 7 + 1) * 8
    state, rest = "all_reduce 40", "all_reduce 40"  # what each rank has read by then
    assert seen("preset: reset") == [
        state,
        "broadcast 8",
        rest,
        "all_reduce 40",
        "all_reduce 112",
        f"all_reduce {report}",
    ]
    assert seen("preset: gradient-scale 0.5")[0] == "all_reduce 40"
    fills = seen(
        "moments: [{match: 'output_layer.weight[40:]', exp_avg: fill mean, "
        "exp_avg_sq: fill column-mean}, {match: 'embedding.word_embeddings.weight[8:]', "
        "exp_avg_sq: fill median}]"
    )
    means = (1 + BF16.hidden) * 33 * 8
    histograms = [f"all_reduce {bins * 8}" for bins in (2048, 1024, 1024)]
    assert fills[:5] == [state, rest, "all_reduce 40", "gather", "all_reduce 112"]
    assert fills[5] == f"all_reduce {means}"
    assert len(fills[6:-1]) == len(histograms)
    assert fills[-1] == f"all_reduce {report + 16}"


def test_an_expert_group_may_keep_its_own_hyperparameters(
    ext: RankPool, checkpoints: Checkpoints
) -> None:
    directory, _ = checkpoints.phase_1(MOE, 2)
    policy = (
        "hyperparameters: {groups: [{match: {is_expert_parallel: true}, keep: [max_lr, betas]}]}"
    )
    second = Hyper(lr=1e-3, min_lr=1e-4, betas=(0.8, 0.9))
    found = ext.run(
        "tests.support.policies:trained",
        2,
        layout=MOE,
        hyper=second,
        directory=directory,
        policy=policy,
        steps=1,
    )[0]
    by_kind = {g["is_expert_parallel"]: g for g in found["groups"]}
    assert (by_kind[True]["max_lr"], by_kind[True]["betas"]) == (FIRST.lr, FIRST.betas)
    assert (by_kind[False]["max_lr"], by_kind[False]["betas"]) == (second.lr, second.betas)


def test_all_hyperparameters_from_the_checkpoint_but_one(
    ext: RankPool, checkpoints: Checkpoints
) -> None:
    directory, _ = checkpoints.phase_1(BF16, 2)
    second = Hyper(lr=1e-3, min_lr=1e-4, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.05)
    found = ext.run(
        "tests.support.policies:trained",
        2,
        layout=BF16,
        hyper=second,
        directory=directory,
        policy="hyperparameters: {source: checkpoint, take: [eps]}",
        steps=1,
    )[0]
    for group in found["groups"]:
        assert (group["max_lr"], group["min_lr"]) == (FIRST.lr, FIRST.min_lr)
        assert group["betas"] == FIRST.betas
        assert group["eps"] == second.eps
        assert group["weight_decay"] == FIRST.weight_decay * group["wd_mult"]
        assert second.lr < group["lr"] <= FIRST.lr
    (first,) = set(found["lrs"][0])
    assert second.lr < first <= FIRST.lr


#: Optimizer of Megatron's chain with Adam -> the class of emerging-optimizers that it builds.
BESIDE_ADAM = {"muon": "TensorParallelMuon", "soap": "SOAP"}
#: Stock cannot save SOAP's factors in torch_dist: their shapes are not the parameter's.
FORMATS = {"muon": "dp_reshardable", "soap": "torch"}


@pytest.mark.parametrize("optimizer", BESIDE_ADAM)
def test_of_another_optimizer_and_adam_the_adam_part_follows_the_policy(
    optimizer: str, stock: RankPool, ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Megatron's own chain; before 0.19 it is built in another way."""
    layout = Layout(distributed=False, optimizer=optimizer, format=FORMATS[optimizer])
    directory, _ = checkpoints.phase_1(layout, 2)
    arguments: dict[str, Any] = {"layout": layout, "directory": directory}
    before = stock.run("tests.support.policies_stock:with_muon", 2, hyper=FIRST, **arguments)[0]
    second = Hyper(lr=1e-3, min_lr=1e-4)
    larger = "preset: {name: batch-size, old: 8, new: 16, decline: [exp_avg_sq]}"
    for policy, kept, kept_beside in [
        ("{}", True, True),
        (larger, True, True),
        ("preset: reset-momentum", False, False),
        ("moments: [{match: '* optimizer=adam', exp_avg: reset}]", False, True),
    ]:
        saved = str(tmp_path / f"phase2-{hash(policy)}")
        found = ext.run(
            "tests.support.policies:chained_with_muon",
            2,
            hyper=second,
            policy=policy,
            target=saved,
            **arguments,
        )[0]
        if policy != larger:  # stock finds a group by its max_lr
            again = {"layout": layout, "hyper": second, "directory": saved}
            stocks = stock.run("tests.support.policies_stock:with_muon", 2, **again)[0]
            assert stocks["steps"] == found["steps"]
            for ours, theirs in zip(found["saved"], stocks["momenta"], strict=True):
                np.testing.assert_array_equal(ours, theirs)
        assert len(found["momenta"]) == len(before["momenta"]) > 0
        for ours, theirs in zip(found["momenta"], before["momenta"], strict=True):
            assert theirs.any()
            if kept_beside:
                np.testing.assert_array_equal(ours, theirs)
        assert kept_beside == all(
            np.array_equal(a, b) for a, b in zip(found["momenta"], before["momenta"], strict=True)
        )
        for name, tensors in before["state"].items():
            ours = found["state"][name]
            np.testing.assert_array_equal(ours["param"], tensors["param"])
            np.testing.assert_array_equal(ours["exp_avg_sq"], tensors["exp_avg_sq"])
            # SOAP has an exp_avg of its own.
            not_adams = any(np.array_equal(tensors["exp_avg"], m) for m in before["momenta"])
            np.testing.assert_array_equal(
                ours["exp_avg"],
                tensors["exp_avg"] if kept or (not_adams and kept_beside) else 0 * ours["exp_avg"],
            )
        assert any(t["exp_avg"].any() for t in before["state"].values())
        of_adam = pytest.approx(1e-3 * (2**0.5 if policy == larger else 1))
        for group in found["groups"]:
            # Muon's groups have no betas, and SOAP's a shampoo_beta.
            is_adams = "betas" in group and "shampoo_beta" not in group
            assert group["max_lr"] == (of_adam if is_adams else 1e-3)
        read = "loaded" if kept_beside else "not loaded"
        beside = {"muon": f" > momentum_buffer: {read}", "soap": " > other state: loaded"}
        assert any(line.startswith(beside[optimizer]) for line in found["lines"])


def _files(directory: str) -> dict[str, str]:
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(directory).rglob("*"))
        if p.is_file()
    }
