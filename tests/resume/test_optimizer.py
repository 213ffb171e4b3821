"""`SelectiveAdam` beside stock: same arguments, the way back, groups, kept keys, the schedule."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version

from tests.conftest import FIRST, STEPS, Checkpoints
from tests.resume.test_resume import (
    CHOSEN,
    MORE,
    SAME,
    SECOND,
    assert_same_run,
    assert_same_state,
)
from tests.support.cells import of_every_version, with_all
from tests.support.harness import GLOBAL_BATCH, Hyper, Layout
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

# Everything stock can load: not plain AdamW, and not fp32 through the copies that need no_grad.
STOCK_LOADS = [
    name
    for name, (layout, _) in SAME.items()
    if not (layout.adam == "torch" and layout.distributed)
    and not (layout.dtype == "fp32" and layout.distributed and layout.format != "fully_reshardable")
]


def resume(ext: RankPool, world: int, directory: str, **kwargs: Any) -> list[dict[str, Any]]:
    kwargs = {"layout": Layout(), "hyper": SECOND, "more": MORE, **kwargs}
    return ext.run("tests.support.subject:resume", world, directory=directory, **kwargs)


@pytest.mark.parametrize("name", with_all(STOCK_LOADS, CHOSEN & {*STOCK_LOADS}))
def test_unchanged_arguments_resume_as_stock(
    name: str, stock: RankPool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    layout, world = SAME[name]
    directory, _ = checkpoints.phase_1(layout, world)
    arguments = dict(layout=layout, hyper=FIRST, directory=directory, more=MORE)
    expected = stock.run("tests.support.oracle:stock_resume", world, **arguments)
    found = ext.run("tests.support.subject:resume", world, **arguments)
    for ours, theirs in zip(found, expected, strict=True):
        assert_same_state(ours["loaded"], theirs["loaded"])
        assert ours["loaded"]["groups"] == theirs["loaded"]["groups"]
        assert_same_run(ours, theirs)


@pytest.mark.parametrize(
    "name",
    of_every_version(
        ["dp2", "dp2-fully_reshardable", "dp2-legacy", "moe-ep2", "replicated-bf16"],
        ["moe-ep2"],
        ["dp2-fully_reshardable", "dp2-legacy"],
    ),
)
def test_stock_goes_on_where_this_package_is_not_installed(
    name: str, stock: RankPool, ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """Phase 2 with this package, phase 3 without it, against phase 3 with it."""
    layout, world = SAME[name]
    assert stock.run("tests.support.oracle:importable", 1, name="megatron_ext") == [False]
    assert stock.run("tests.support.oracle:importable", 1, name="megatron.core") == [True]
    directory, _ = checkpoints.phase_1(layout, world)
    phase_2 = str(tmp_path / "phase2")
    saved = resume(ext, world, directory, layout=layout, save_to=phase_2)
    arguments = dict(layout=layout, hyper=SECOND, directory=phase_2, more=MORE)
    without = stock.run("tests.support.oracle:stock_resume", world, **arguments)
    with_it = ext.run("tests.support.subject:resume", world, **arguments)
    for before, theirs, ours in zip(saved, without, with_it, strict=True):
        assert theirs["loaded"]["steps"] == [STEPS + MORE]
        assert_same_state(theirs["loaded"], before["final"])
        assert_same_run(theirs, ours)


def test_a_negated_moment_is_noticed(
    stock: RankPool, ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    layout, world = SAME["dp2-legacy"]
    directory, saved = checkpoints.phase_1(layout, world)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in Path(directory).rglob("*.pt"):
        state = torch.load(file, weights_only=False)
        if file.name == "distrib_optim.pt":
            for world_tensors in state[0].values():
                world_tensors["exp_avg"].neg_()
        target = damaged / file.relative_to(directory)
        target.parent.mkdir(exist_ok=True)
        torch.save(state, target)
    found = resume(ext, world, str(damaged), layout=layout)
    expected = stock.run(
        "tests.support.oracle:uninterrupted",
        world,
        layout=layout,
        first=FIRST,
        second=SECOND,
        steps=STEPS,
        more=MORE,
    )
    with pytest.raises(AssertionError, match="exp_avg"):
        assert_same_state(found[0]["loaded"], saved[0])
    with pytest.raises(AssertionError):
        assert_same_run(found[0], expected[0])
    assert found[0]["losses"] != expected[0]["losses"]


@pytest.mark.matrix
def test_stock_fails_or_keeps_the_old_learning_rate(
    stock: RankPool, ext: RankPool, checkpoints: Checkpoints, megatron: Version
) -> None:
    """The case this package exists for, as its first users met it."""
    layout, world = SAME["dp2"]
    first = Hyper(lr=3e-4, min_lr=3e-5)
    second = Hyper(lr=3e-5, min_lr=2e-5)
    directory, _ = checkpoints.phase_1(layout, world, first)
    kind, message = stock.run(
        "tests.support.oracle:stock_error", world, layout=layout, hyper=second, directory=directory
    )[0]
    if megatron >= Version("0.19"):
        assert kind == "KeyError"
        assert "3e-05" in message
        assert "2e-05" in message
    else:
        assert kind == ""
        stuck = stock.run(
            "tests.support.oracle:stock_resume",
            world,
            layout=layout,
            hyper=second,
            directory=directory,
            more=1,
        )
        assert stuck[0]["lrs"][0][0] > 2.5e-4
    ours = resume(ext, world, directory, hyper=second)
    assert ours[0]["lrs"][0] == [_cosine(second, STEPS)] * 2
    assert ours[0]["lrs"][0][0] < 3e-5


def _cosine(hyper: Hyper, iteration: int) -> float:
    """Learning rate of the step after `iteration` steps, from the schedule's definition."""
    done = (iteration - hyper.warmup_iters) / (hyper.train_iters - hyper.warmup_iters)
    return hyper.min_lr + 0.5 * (math.cos(math.pi * done) + 1.0) * (hyper.lr - hyper.min_lr)


@pytest.mark.parametrize(
    "name", of_every_version(["dp2", "dp2-fully_reshardable", "replicated-bf16"], ["dp2"])
)
def test_the_override_flag_makes_no_difference(
    name: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    layout, world = SAME[name]
    directory, _ = checkpoints.phase_1(layout, world)
    runs = [
        resume(ext, world, directory, layout=layout, override=override)
        for override in (False, True)
    ]
    assert runs[0][0]["lrs"] == runs[1][0]["lrs"]
    assert_same_run(runs[0][0], runs[1][0])


@pytest.mark.matrix
def test_schedule_from_the_checkpoint(
    stock: RankPool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    """--use-checkpoint-opt_param-scheduler: lr and weight decay go on, betas and eps change."""
    layout, world = SAME["dp2"]
    directory, _ = checkpoints.phase_1(layout, world)
    expected = stock.run(
        "tests.support.oracle:uninterrupted",
        world,
        layout=layout,
        first=FIRST,
        second=replace(FIRST, betas=SECOND.betas, eps=SECOND.eps),
        steps=STEPS,
        more=MORE,
    )
    found = resume(ext, world, directory, use_checkpoint=True, policy={"schedule": "checkpoint"})
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["wds"][0] == [FIRST.weight_decay, 0.0]
        assert_same_run(ours, theirs)


@pytest.mark.parametrize("override", of_every_version([False, True], [False]))
def test_increasing_weight_decay_is_right_on_the_first_step(
    override: bool, stock: RankPool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    layout, world = SAME["dp2"]
    first = replace(FIRST, start_wd=0.01, end_wd=0.2, wd_incr_style="linear")
    second = replace(first, start_wd=0.02, end_wd=0.4, train_iters=20)
    directory, _ = checkpoints.phase_1(layout, world, first)
    found = resume(ext, world, directory, hyper=second, override=override)
    assert found[0]["wds"][0] == pytest.approx([0.02 + (0.4 - 0.02) * STEPS / 20, 0.0])
    expected = stock.run(
        "tests.support.oracle:uninterrupted",
        world,
        layout=layout,
        first=first,
        second=second,
        steps=STEPS,
        more=MORE,
    )
    assert_same_run(found[0], expected[0])


def test_increasing_weight_decay_from_the_checkpoint(
    ext: RankPool, checkpoints: Checkpoints
) -> None:
    """Stock computes the first step before it has restored start_wd (Megatron-LM #7468)."""
    layout, world = SAME["dp2"]
    first = replace(FIRST, start_wd=0.01, end_wd=0.2, wd_incr_style="linear")
    directory, _ = checkpoints.phase_1(layout, world, first)
    found = resume(
        ext,
        world,
        directory,
        hyper=replace(SECOND, start_wd=0.3, end_wd=0.5, wd_incr_style="linear"),
        use_checkpoint=True,
        policy={"schedule": "checkpoint"},
    )
    assert found[0]["wds"][0] == pytest.approx([0.01 + 0.19 * STEPS / FIRST.train_iters, 0.0])


KEPT = {
    "betas": ({}, {"betas": [0.9, 0.95]}),
    "eps": ({}, {"eps": 1e-8}),
    "max_lr": ({}, {"max_lr": FIRST.lr}),
    "weight_decay": ({}, {"weight_decay": FIRST.weight_decay}),
}


@pytest.mark.parametrize("key", of_every_version(KEPT, ["betas"]))
def test_a_kept_key_comes_from_the_checkpoint(
    key: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    layout, world = SAME["dp2"]
    directory, _ = checkpoints.phase_1(layout, world)
    found = resume(ext, world, directory, policy={"keep_hyperparameters": (key,)})[0]
    group = found["final"]["groups"][0]
    expected = {
        "betas": SECOND.betas,
        "eps": SECOND.eps,
        "max_lr": SECOND.lr,
        "min_lr": SECOND.min_lr,
        "weight_decay": SECOND.weight_decay,
        **KEPT[key][1],
    }
    assert {k: list(group[k]) if k == "betas" else group[k] for k in expected} == {
        k: list(v) if k == "betas" else v for k, v in expected.items()
    }
    told = found["report"]["optimizers"][0]["groups"][0]["keys"][key]
    assert told["taken"] == "checkpoint"
    assert told["reason"] == f"--selective-keep-hyperparameters {key}"
    if key == "max_lr":
        assert found["lrs"][0][0] == _cosine(replace(SECOND, lr=FIRST.lr), STEPS)
    if key == "weight_decay":
        assert found["wds"][0] == [FIRST.weight_decay, 0.0]


DECOUPLED = replace(SECOND, decoupled_lr=7e-4, decoupled_min_lr=7e-5)

GROUPS = {
    "a group is added": (FIRST, DECOUPLED),
    "a group is removed": (replace(FIRST, decoupled_lr=5e-3, decoupled_min_lr=5e-4), SECOND),
    "bounds change": (replace(FIRST, decoupled_lr=5e-3, decoupled_min_lr=5e-4), DECOUPLED),
    "the order changes": (
        replace(FIRST, decoupled_lr=5e-3, decoupled_min_lr=5e-4, extra_group=True),
        replace(SECOND, decoupled_lr=2e-4, decoupled_min_lr=7e-5, extra_group=True),
    ),
}


@pytest.mark.parametrize(
    ("name", "layout"),
    of_every_version(
        itertools.product(GROUPS, ("dp2", "dp2-fully_reshardable", "replicated-bf16")),
        [("the order changes", "dp2")],
        [
            *((name, "dp2") for name in GROUPS),
            ("a group is added", "dp2-fully_reshardable"),
            ("the order changes", "replicated-bf16"),
        ],
    ),
)
def test_every_group_keeps_its_own_bounds(
    name: str, layout: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    first, second = GROUPS[name]
    where, world = SAME[layout]
    directory, saved = checkpoints.phase_1(where, world, first)
    found = resume(ext, world, directory, layout=where, hyper=second)
    groups = found[0]["final"]["groups"]
    bounds = {(g["max_lr"], g["min_lr"]) for g in groups}
    expected = {(second.lr, second.min_lr)}
    if second.decoupled_lr is not None:
        expected.add((second.decoupled_lr, second.decoupled_min_lr))
    if second.extra_group:
        expected.add((second.lr / 2, second.min_lr / 2))
    assert bounds == expected
    assert found[0]["lrs"][0] == [
        _cosine(replace(second, lr=g["max_lr"], min_lr=g["min_lr"]), STEPS) for g in groups
    ]
    for rank in range(world):
        assert found[rank]["loaded"]["steps"] == [STEPS]
        assert _multiset(found[rank]["loaded"]) == _multiset(saved[rank])


def _multiset(state: dict[str, Any]) -> list[tuple[Any, ...]]:
    """The shards whatever the order of the groups; each moment stays with its weights."""
    return sorted(
        tuple(shard[key].tobytes() for key in ("param", "exp_avg", "exp_avg_sq"))
        for shard in state["shards"]
    )


def test_train_iters_may_change_without_the_override_flag(
    stock: RankPool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    layout, world = SAME["dp2"]
    directory, _ = checkpoints.phase_1(layout, world)
    longer = replace(FIRST, train_iters=80)
    with pytest.raises(AssertionError, match="do not match"):
        stock.run(
            "tests.support.oracle:stock_resume",
            world,
            layout=layout,
            hyper=longer,
            directory=directory,
            more=1,
            override=False,
        )
    found = resume(ext, world, directory, hyper=longer, override=False)
    assert found[0]["lrs"][0][0] == _cosine(longer, STEPS)


@pytest.mark.matrix
def test_torch_adamw_counts_one_step_per_step(ext: RankPool, checkpoints: Checkpoints) -> None:
    """Stock hands every parameter the same step tensor, which then advances once for each."""
    layout, world = SAME["adamw-dp2"]
    directory, _ = checkpoints.phase_1(layout, world)
    found = resume(ext, world, directory, layout=layout)
    assert found[0]["final"]["steps"] == [STEPS + MORE]


def test_the_report_counts_what_was_loaded(
    ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    layout, world = SAME["moe-ep2"]
    directory, saved = checkpoints.phase_1(layout, world)
    found = resume(ext, world, directory, layout=layout, report_dir=str(tmp_path))[0]
    assert found["members"] == ["SelectiveAdam", "SelectiveAdam"]
    optimizers = found["report"]["optimizers"]
    assert len(optimizers) == 2
    for key in ("param", "exp_avg", "exp_avg_sq"):
        elements = sum(shard[key].size for state in saved for shard in state["shards"])
        shards = sum(len(state["shards"]) for state in saved)
        assert sum(o["loaded"]["elements"][key] for o in optimizers) == elements > 0
        assert sum(o["loaded"]["tensors"][key] for o in optimizers) == shards
    assert (tmp_path / "resume-report.json").is_file()
    first = found["report"]["scheduler"]["first_step"]
    assert [f["lr"] for f in first] == found["lrs"][0]
    assert [f["weight_decay"] for f in first] == found["wds"][0]
    assert found["report"]["scheduler"]["num_steps"] == STEPS * GLOBAL_BATCH


def test_loading_twice_is_loading_once(ext: RankPool, checkpoints: Checkpoints) -> None:
    layout, world = SAME["dp2"]
    directory, saved = checkpoints.phase_1(layout, world)
    found = ext.run(
        "tests.support.subject:load_twice", world, layout=layout, hyper=SECOND, directory=directory
    )
    for rank in range(world):
        assert_same_state(found[rank], saved[rank])


@pytest.mark.matrix
def test_collectives_of_a_load(ext: RankPool, checkpoints: Checkpoints) -> None:
    """Beyond stock's own: a small one at the build, four at the load, none in a training step."""
    layout, world = SAME["dp2"]
    directory, _ = checkpoints.phase_1(layout, world)
    counts = ext.run(
        "tests.support.subject:count_collectives",
        world,
        layout=layout,
        hyper=SECOND,
        directory=directory,
    )[0]
    assert counts["load"] == [40, 40, 40, 40, 112]
    assert counts["step"] == counts["stock step"] > 0


def test_np_arrays_differ_is_noticed() -> None:
    """The comparison itself: one changed element is an error."""
    state = {"steps": [1], "shards": [{k: np.ones(3) for k in ("param", "exp_avg", "exp_avg_sq")}]}
    other = {"steps": [1], "shards": [{**state["shards"][0], "exp_avg_sq": np.array([1, 1, 2.0])}]}
    assert_same_state(state, state)
    with pytest.raises(AssertionError, match="exp_avg_sq"):
        assert_same_state(other, state)
