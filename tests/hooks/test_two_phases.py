"""A phase with other hyperparameters, with any Megatron: what `make contract` runs.

From 0.20 on Megatron's load with --override-opt_param-scheduler ends with --lr and --min-lr in each
param_group and the consumed samples in the scheduler. The flag must make no difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.runs import Runs, Scenario, needs_training, ok, runs_of
from tests.support.training import Training, Zygote

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
