"""A phase with other hyperparameters, with any Megatron: what `make contract` runs.

From 0.20 on Megatron's load with --override-opt_param-scheduler ends with --lr and --min-lr in each
param_group and the consumed samples in the scheduler. The flag must make no difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_ext import cli
from tests.support.runs import Runs, Scenario, needs_training, ok, runs_of
from tests.support.training import ROOT, Training, Zygote

pytestmark = [pytest.mark.e2e, needs_training]

FORMAT = "--bf16 --use-distributed-optimizer --ckpt-format torch_dist --lr-decay-iters 20"
OURS = "--optimizer-class megatron_ext.SelectiveAdam --selective-report {report}"
PHASE_1 = f"--lr 3e-4 --min-lr 3e-5 --decoupled-lr 1e-3 --decoupled-min-lr 1e-4 {FORMAT}"
PHASE_2 = f"--lr 3e-5 --min-lr 2e-5 --decoupled-lr 7e-4 --decoupled-min-lr 7e-5 {FORMAT} {OURS}"
FLAG = "--override-opt_param-scheduler"
#: What Megatron would undo, and the bounds that the groups have then: all others and embeddings.
POLICIES = {
    "bounds of each group": ("", {(3e-5, 2e-5), (7e-4, 7e-5)}),
    "kept bounds": (
        "--selective-keep-hyperparameters max_lr min_lr",
        {(3e-4, 3e-5), (1e-3, 1e-4)},
    ),
    "restarted schedule": ("--selective-schedule restart", {(3e-5, 2e-5), (7e-4, 7e-5)}),
}


def resumed(policy: str, flag: str) -> Scenario:
    arguments = f"{PHASE_2} --train-iters 6 {policy} {flag}"
    return Scenario(arguments, "phase 1", script="tests/support/groups_script.py")


SCENARIOS = {
    "phase 1": Scenario(f"{PHASE_1} --train-iters 4", saves=True),
    **{name: resumed(policy, "") for name, (policy, _) in POLICIES.items()},
    **{f"{name}, flag": resumed(policy, FLAG) for name, (policy, _) in POLICIES.items()},
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Runs]:
    yield from runs_of(SCENARIOS, request, tmp_path_factory.mktemp("runs"), zygote)


def after_the_load(run: Training) -> dict[str, Any]:
    (line,) = (one for one in ok(run).log.splitlines() if one.startswith("AFTER THE LOAD: "))
    found: dict[str, Any] = json.loads(line.removeprefix("AFTER THE LOAD: "))
    return found


@pytest.mark.reads(*SCENARIOS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_second_phase_is_the_same_with_the_override_flag(name: str, runs: Runs) -> None:
    without, beside = runs[name], runs[f"{name}, flag"]
    found = after_the_load(without)
    bounds = {(group["max_lr"], group["min_lr"]) for group in found["groups"]}
    assert bounds == POLICIES[name][1]
    assert found["num_steps"] == (0 if name == "restarted schedule" else 32)
    assert after_the_load(beside) == found
    assert without.iterations == beside.iterations
    assert list(without.iterations) == [5, 6]
    assert without.report is not None
    assert without.report["scheduler"]["num_steps"] == found["num_steps"]


@pytest.mark.reads("phase 1")
def test_stock_takes_an_edited_copy_with_the_flags_that_edit_prints(
    runs: Runs,
    zygote: Zygote,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ok(runs["phase 1"])
    # Groups with --decoupled-lr keep their bounds.
    wanted = ["max_lr=3e-5", "min_lr=2e-5", "--group", "default_config=true"]
    command = ["edit", str(runs.checkpoint("phase 1")), "--out", str(tmp_path / "rates"), "--set"]
    assert cli.main([*command, *wanted]) == 0
    command = ["edit", str(tmp_path / "rates"), "--out", str(tmp_path / "copy"), "--set"]
    assert cli.main([*command, "weight_decay=0.05", "betas=0.8,0.9", "wd_incr_steps=48"]) == 0
    (flags,) = re.findall("^flags for stock Megatron: (.*)", capsys.readouterr().out, re.MULTILINE)[
        1:
    ]
    assert flags == (
        "--lr 3e-05 --min-lr 2e-05 --decoupled-lr 0.001 --decoupled-min-lr 0.0001 --adam-beta1 0.8 "
        "--adam-beta2 0.9 --adam-eps 1e-08 --weight-decay 0.05 --global-batch-size 8 "
        "--lr-decay-style linear --lr-decay-iters 20 --lr-warmup-iters 0 --train-iters 6"
    )
    stock = zygote.run(
        tmp_path / "run",
        "--bf16 --use-distributed-optimizer --ckpt-format torch_dist --load "
        f"{tmp_path / 'copy'} {flags}",
        launcher="--cpu",
        script=ROOT / "tests/support/groups_script.py",
    )
    found = after_the_load(stock)
    decay = {(g["wd_mult"], g["weight_decay"]) for g in found["groups"]}
    assert decay == {(1.0, 0.05), (0.0, 0.0)}
    bounds = {(g["max_lr"], g["min_lr"]) for g in found["groups"]}
    assert bounds == {(3e-5, 2e-5), (1e-3, 1e-4)}
    assert {tuple(g["betas"]) for g in found["groups"]} == {(0.8, 0.9)}
    assert list(stock.iterations) == [5, 6]
