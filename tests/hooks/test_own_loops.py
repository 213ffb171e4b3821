"""`megatron_ext.enable` in scripts with a loop of their own, and before Megatron's loop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import Runs, Scenario, needs_training, ok, runs_of
from tests.support.training import Training, Zygote

SUPPORT = Path(__file__).parents[1] / "support"
OWN, PRIMUS = "tests/support/rl_script.py", "tests/support/primus_script.py"
SHAPE = "--bf16 --use-distributed-optimizer --ckpt-format torch_dist --lr-decay-iters 20"
PHASE_1 = f"--lr 3e-4 --min-lr 3e-5 --train-iters 4 {SHAPE}"
PHASE_2 = f"--lr 3e-5 --min-lr 2e-5 --train-iters 8 {SHAPE}"
RESET, COUNTERS = str(SUPPORT / "policy.yaml"), str(SUPPORT / "counters.yaml")


def enabled(
    policy: str, loads: str | None = "phase 1", how: str = "call", script: str = OWN, **more: object
) -> Scenario:
    env = {"ENABLE": how, "MEGATRON_EXT_POLICY": policy}
    env |= {str(name): "1" for name in more.pop("also", ())}  # type: ignore[attr-defined]
    return Scenario(PHASE_2, loads, world=2, script=script, env=env, **more)  # type: ignore[arg-type]


SCENARIOS = {
    "phase 1": Scenario(PHASE_1, saves=True, world=2, script=OWN),
    "stock": Scenario(PHASE_2, "phase 1", world=2, script=OWN, fails=True),
    "same": Scenario(
        f"{PHASE_1} --train-iters 8 --override-opt_param-scheduler", "phase 1", world=2, script=OWN
    ),
    "lower lr": enabled("default", how="import"),
    "reset": enabled(RESET, saves=True),
    "restarted": enabled(RESET, "reset"),
    "counters": enabled(COUNTERS, also=["COUNTERS"], saves=True),
    "counters restarted": enabled(COUNTERS, "counters", also=["COUNTERS"]),
    "nobody asks": enabled(COUNTERS, fails=True, saves=True),
    "not loaded": enabled(RESET, None, fails=True, saves=True),
    "late": enabled(RESET, how="late", fails=True),
    "stepped again": enabled(RESET, also=["STEP_AGAIN"], fails=True),
    "primus": enabled(COUNTERS, script=PRIMUS),
    "no variable": Scenario(
        PHASE_2, "phase 1", world=2, script=OWN, env={"ENABLE": "import"}, fails=True
    ),
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Runs]:
    yield from runs_of(SCENARIOS, request, tmp_path_factory.mktemp("own"), zygote)


def lrs(run: Training) -> list[float]:
    return [float(found) for found in re.findall(r"^LR: (\S+)", run.ranks[0], re.MULTILINE)]


def iterations(run: Training) -> list[int]:
    return [int(n) for n in re.findall(r"^ITERATION: (\d+)", run.ranks[0], re.MULTILINE)]


def errors(run: Training, kind: str) -> list[str]:
    """Each rank's error; the run has failed on all of them."""
    assert run.returncode != 0
    found = [re.findall(rf"{kind}: (.*)", log) for log in run.ranks.values()]
    assert all(found), run.log[-3000:]
    return [lines[-1] for lines in found]


pytestmark = [pytest.mark.e2e, needs_training]


def expected_lrs(first: int, count: int) -> list[float]:
    """Linear decay from 3e-5 to 2e-5 in 20 iterations."""
    return [2e-5 + 1e-5 * (1 - i / 20) for i in range(first, first + count)]


@pytest.mark.reads("phase 1", "stock", "lower lr")
def test_functions_that_were_bound_before_enable_resume(runs: Runs) -> None:
    run = ok(runs["lower lr"])
    assert "KeyError" in runs["stock"].log
    assert iterations(run) == [5, 6, 7, 8]
    assert lrs(run) == pytest.approx(expected_lrs(4, 4), rel=1e-12)
    assert "guard: 1 step after the load the hyperparameters match the plan" in run.log
    assert "exp_avg: loaded from checkpoint" in run.log


@pytest.mark.reads("same", "lower lr")
def test_the_first_loss_is_the_checkpoints(runs: Runs) -> None:
    assert ok(runs["lower lr"]).exact_losses[0] == ok(runs["same"]).exact_losses[0]


@pytest.mark.reads("reset", "restarted")
def test_a_transition_happens_once(runs: Runs) -> None:
    assert "TRANSITION APPLIED" in ok(runs["reset"]).log
    assert " > preset reset: exp_avg reset, exp_avg_sq reset" in runs["reset"].log
    again = ok(runs["restarted"])
    assert "CONTINUED" in again.log
    assert "TRANSITION APPLIED" not in again.log


@pytest.mark.reads("counters", "counters restarted")
def test_a_loop_that_asks_gets_its_counters(runs: Runs) -> None:
    run = ok(runs["counters"])
    assert iterations(run) == list(range(1, 9))
    assert run.rows[0] == (0,)
    assert "iteration reset" in run.log
    again = runs["counters restarted"]
    assert "CONTINUED" in ok(again).log
    assert iterations(again) == []  # 8 of 8 iterations are done


@pytest.mark.reads("nobody asks")
def test_counters_that_nobody_takes_stop_the_first_step(runs: Runs) -> None:
    for error in errors(runs["nobody asks"], "HostError"):
        assert error.startswith("the policy resets the iteration and the data position, and no")
        assert "counters()" in error
    assert runs["nobody asks"].exact_losses == []
    assert not runs.checkpoint("nobody asks").exists()


@pytest.mark.reads("not loaded")
def test_a_policy_for_moments_needs_a_load(runs: Runs) -> None:
    for error in errors(runs["not loaded"], "HostError"):
        assert error.startswith("the policy asks for preset reset, but no optimizer state was")
    assert not runs.checkpoint("not loaded").exists()


@pytest.mark.reads("late")
def test_it_is_too_late_after_an_optimizer_was_built(runs: Runs) -> None:
    for error in errors(runs["late"], "HostError"):
        assert error.startswith("megatron_ext.enable was called after an optimizer was built")


@pytest.mark.reads("stepped again")
def test_the_guard_is_in_the_optimizers_own_step(runs: Runs) -> None:
    for error in errors(runs["stepped again"], "GuardError"):
        assert "the first resumed step does not use the planned hyperparameters" in error
        assert "param_group 0: lr is " in error


@pytest.mark.reads("no variable")
def test_the_module_needs_its_variable(runs: Runs) -> None:
    for error in errors(runs["no variable"], "HostError"):
        assert "MEGATRON_EXT_POLICY is not set" in error


@pytest.mark.matrix
@pytest.mark.reads("primus")
def test_megatrons_own_loop_takes_the_counters(runs: Runs) -> None:
    run = ok(runs["primus"])
    assert list(run.iterations) == list(range(1, 9))
    assert [samples for samples, _, _ in run.iterations.values()] == [8 * i for i in range(1, 9)]
    assert "guard: 1 step after the load" in run.log
