"""The first resumed step is held against the plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.host.optimizers import ADAM, TABLE, OptimizerState
from megatron_ext.resume.guard import GroupValues, wrong_hyperparameters, wrong_moments
from tests.support.runs import Runs, Scenario, needs_training, ok, runs_of
from tests.support.training import Zygote

PLAN = {"lr": 3e-5, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "max_lr": 3e-5}


def groups(**changes: Any) -> list[GroupValues]:
    return [GroupValues.of(0, 0, PLAN), GroupValues.of(0, 1, {**PLAN, **changes})]


def test_the_planned_values_are_right_in_whatever_type_they_come() -> None:
    assert wrong_hyperparameters(groups(), groups()) == ""
    assert wrong_hyperparameters(groups(), groups(betas=[0.9, 0.95], lr=np.float64(3e-5))) == ""
    assert wrong_hyperparameters(groups(), groups(max_lr=1.0)) == ""  # the scheduler has used it


@pytest.mark.parametrize(
    ("key", "value"),
    [("lr", 3e-4), ("weight_decay", 0.0), ("betas", (0.9, 0.999)), ("eps", 1e-6)],
)
def test_another_value_is_named_with_both(key: str, value: Any) -> None:
    message = wrong_hyperparameters(groups(), groups(**{key: value}))
    assert f"optimizer 0 param_group 1: {key} is {value}, expected {PLAN[key]}" in message
    assert "param_group 0" not in message
    assert "--no-selective-guard" in message


@given(
    seed=st.integers(0, 2**32),
    b1=st.floats(0.0, 0.99),
    b2=st.floats(0.5, 0.999),
    loaded=st.floats(0.0, 100.0),
    scale=st.floats(1e-3, 1.0),
)
def test_what_adam_makes_is_always_right(
    seed: int, b1: float, b2: float, loaded: float, scale: float
) -> None:
    """Adam's own recurrence in float64, for any moments and gradients."""
    draw = np.random.default_rng(seed)
    m, v = loaded * draw.normal(size=50), loaded * draw.random(50)
    before = float(np.linalg.norm(m)), float(np.linalg.norm(v))
    g = scale * draw.normal(size=50) * draw.choice([0.0, 1.0, 30.0], size=50)
    norm = float(np.linalg.norm(g))
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    after = float(np.linalg.norm(m)), float(np.linalg.norm(v))
    assert wrong_moments(0, ADAM, (b1, b2), before, after, norm) == ""
    # The norm may be an upper bound.
    assert wrong_moments(0, ADAM, (b1, b2), before, after, 2 * norm) == ""


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ((0.0, 4.0), "exp_avg has norm 0, expected 8.9 to 9.1"),
        ((10.0, 4.0), "exp_avg has norm 10, expected"),
        ((9.0, 3.0), "exp_avg_sq has norm 3, expected 3.8 to 3.85"),
        ((9.0, 5.0), "exp_avg_sq has norm 5, expected"),
        ((float("nan"), 3.8), "exp_avg has norm nan"),
    ],
)
def test_what_adam_cannot_have_made_is_named(after: tuple[float, float], said: str) -> None:
    message = wrong_moments(2, ADAM, (0.9, 0.95), (10.0, 4.0), after, 1.0)
    assert message.startswith("optimizer 2: 1 step after the load")
    assert said in message


@given(
    row=st.sampled_from([row for row in TABLE if not row.adam]),
    seed=st.integers(0, 2**32),
    b=st.floats(0.0, 0.999),
    loaded=st.floats(0.0, 100.0),
)
def test_what_another_optimizer_makes_is_right_and_nothing_else(
    row: OptimizerState, seed: int, b: float, loaded: float
) -> None:
    """The recurrence of each row in float64, and moments that were not stepped or doubled."""
    draw = np.random.default_rng(seed)
    g, before, after = draw.normal(size=50), [], []
    for moment in row.moments:
        old = loaded * draw.normal(size=50)
        old = np.abs(old) if moment.order == 2 else old
        added = g**moment.order
        before.append(float(np.linalg.norm(old)))
        after.append(float(np.linalg.norm(b * old + added * (1 - b if moment.average else 1))))
    decays, norm = [b] * len(row.moments), float(np.linalg.norm(g))
    assert wrong_moments(0, row, decays, before, after, norm) == ""
    for number, moment in enumerate(row.moments):
        if moment.of_gradient:
            wrong = [*after]
            wrong[number] = 3 * (before[number] + norm**moment.order) + 1
            said = wrong_moments(0, row, decays, before, wrong, norm)
            assert f"an update by {row.name}" in said
            assert f"{moment.tensor} has norm" in said


DIST = "--bf16 --use-distributed-optimizer --ckpt-format torch_dist"
PHASE_1 = f"--lr 3e-4 --min-lr 3e-5 --train-iters 4 --lr-decay-iters 20 {DIST}"
PHASE_2 = (
    f"--lr 3e-5 --min-lr 2e-5 --train-iters 8 --lr-decay-iters 20 {DIST} "
    "--optimizer-class megatron_ext.SelectiveAdam"
)
SCRIPT = "tests/support/tampering_script.py"

SCENARIOS = {
    "phase 1": Scenario(PHASE_1, saves=True, world=2),
    "plain": Scenario(PHASE_2, "phase 1", world=2),
    "reset": Scenario(f"{PHASE_2} --selective-preset reset", "phase 1", world=2),
    "dry run": Scenario(
        f"{PHASE_2} --selective-dry-run --selective-report {{report}}",
        "phase 1",
        world=2,
        saves=True,
    ),
    **{
        what: Scenario(PHASE_2, "phase 1", world=2, script=SCRIPT, tamper=what, fails=True)
        for what in ("lr", "betas", "exp_avg", "exp_avg_sq")
    },
    "not guarded": Scenario(
        f"{PHASE_2} --no-selective-guard", "phase 1", world=2, script=SCRIPT, tamper="lr"
    ),
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Runs]:
    yield from runs_of(SCENARIOS, request, tmp_path_factory.mktemp("runs"), zygote)


GUARDED = "megatron_ext: guard: 1 step after the load the hyperparameters match the plan"


@pytest.mark.e2e
@needs_training
@pytest.mark.reads("plain", "reset")
def test_a_resume_as_planned_goes_on(runs: Runs) -> None:
    for name in ("plain", "reset"):
        run = ok(runs[name])
        assert run.log.count(GUARDED) == 1
        assert list(run.iterations) == [5, 6, 7, 8]


@pytest.mark.e2e
@needs_training
@pytest.mark.parametrize(
    ("what", "said", "steps"),
    [
        pytest.param(
            what,
            said,
            steps,
            marks=[pytest.mark.reads(what), *([pytest.mark.matrix] if what == "exp_avg" else [])],
            id=what,
        )
        for what, said, steps in (
            ("lr", "param_group 1: lr is ", 0),
            ("betas", "param_group 0: betas is (0.5, 0.9), expected (0.9, 0.999)", 0),
            ("exp_avg", "exp_avg has norm ", 1),
            ("exp_avg_sq", "exp_avg_sq has norm ", 1),
        )
    ],
)
def test_a_changed_optimizer_stops_the_run(what: str, said: str, steps: int, runs: Runs) -> None:
    run = runs[what]
    assert run.returncode != 0
    assert run.iterations == {}
    refusing = [rank for rank, log in run.ranks.items() if "GuardError" in log]
    assert refusing == ([1] if what == "exp_avg" else [0, 1])
    for rank in refusing:
        assert said in run.ranks[rank]
        assert ("1 step after the load" in run.ranks[rank]) == (steps == 1)


@pytest.mark.e2e
@needs_training
@pytest.mark.reads("not guarded")
def test_the_guard_can_be_left_out(runs: Runs) -> None:
    run = ok(runs["not guarded"])
    said = run.log
    for name in ("no-selective-guard", "selective_guard", "not_guarded"):  # flags and directories
        said = said.replace(name, "")
    assert "guard" not in said
    assert list(run.iterations) == [5, 6, 7, 8]


@pytest.mark.e2e
@pytest.mark.matrix
@needs_training
@pytest.mark.reads("dry run")
def test_a_dry_run_ends_before_the_first_step(runs: Runs) -> None:
    run = ok(runs["dry run"])
    assert run.iterations == {}
    assert (
        "--selective-dry-run: model and optimizer are built and loaded; no training step is run"
        in run.ranks[0]
    )
    assert ">   max_lr: using argument value 3e-05 (checkpoint 0.0003" in run.ranks[0]
    assert " > first resumed step, optimizer 0 group 0: learning rate" in run.ranks[0]
    assert not runs.checkpoint("dry run").exists()
