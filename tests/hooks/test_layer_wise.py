"""Muon with --use-distributed-optimizer: whole parameters on each rank, an Adam or Lion beside."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.runs import Runs, Scenario, needs_training, ok, runs_of
from tests.support.training import Training, Zygote

pytestmark = [
    pytest.mark.e2e,
    needs_training,
    pytest.mark.skipif(
        importlib.util.find_spec("emerging_optimizers") is None,
        reason="Muon needs the package emerging-optimizers",
    ),
]

RUN = "--lr 3e-4 --min-lr 3e-5 --train-iters 6 --lr-decay-iters 20 --bf16 --ckpt-format torch_dist "
OURS = "--optimizer-class megatron_ext.SelectiveAdam --selective-report {report}"
GUARDED = (
    "guard: 1 step after the load the hyperparameters match the plan, and the moment norms can "
    "result from one update"
)
ARGUMENTS = {
    "muon": "--optimizer muon --use-distributed-optimizer",
    "dist_muon": "--optimizer dist_muon",
    "muon and lion": "--optimizer muon --use-distributed-optimizer --muon-scalar-optimizer lion",
}
SCENARIOS = {
    **{
        f"{name}, phase 1": Scenario(f"{RUN} {of_case} --exit-interval 4", saves=True, world=2)
        for name, of_case in ARGUMENTS.items()
    },
    **{
        f"{name}, stock": Scenario(f"{RUN} {of_case}", f"{name}, phase 1", world=2)
        for name, of_case in ARGUMENTS.items()
    },
    **{
        f"{name}, ours": Scenario(f"{RUN} {of_case} {OURS}", f"{name}, phase 1", world=2)
        for name, of_case in ARGUMENTS.items()
    },
    "muon, stock, 1 rank": Scenario(f"{RUN} {ARGUMENTS['muon']}", "muon, phase 1"),
    "muon, ours, 1 rank": Scenario(f"{RUN} {ARGUMENTS['muon']} {OURS}", "muon, phase 1"),
    "muon, reset": Scenario(
        f"{RUN} {ARGUMENTS['muon']} {OURS} --lr 1e-4 --selective-preset reset",
        "muon, phase 1",
        world=2,
    ),
    "muon and lion, scaled": Scenario(
        f"{RUN} {ARGUMENTS['muon and lion']} {OURS} --lr 1e-4 --exit-interval 5 "
        "--selective-policy tests/support/halved.yaml",
        "muon and lion, phase 1",
        world=2,
        saves=True,
    ),
    "muon and lion, stock again": Scenario(
        f"{RUN} {ARGUMENTS['muon and lion']} --lr 1e-4",
        "muon and lion, scaled",
        world=2,
    ),
    "without, of a layer-wise one": Scenario(
        f"{RUN} --optimizer muon {OURS}", "muon, phase 1", world=2, fails=True
    ),
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Runs]:
    yield from runs_of(SCENARIOS, request, tmp_path_factory.mktemp("runs"), zygote)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.reads(*(one for one in SCENARIOS if one.startswith(f"{name}, "))),
        )
        for name in ARGUMENTS
    ],
)
def test_with_the_same_arguments_it_is_stocks_resume(name: str, runs: Runs) -> None:
    ours, stock = ok(runs[f"{name}, ours"]), ok(runs[f"{name}, stock"])
    assert list(stock.iterations) == [5, 6]
    assert ours.iterations == stock.iterations
    assert GUARDED in ours.log


@pytest.mark.reads("muon, stock, 1 rank", "muon, ours, 1 rank")
def test_with_another_number_of_ranks_too(runs: Runs) -> None:
    ours, stock = ok(runs["muon, ours, 1 rank"]), ok(runs["muon, stock, 1 rank"])
    assert list(stock.iterations) == [5, 6]
    assert ours.iterations == stock.iterations


def _report(run: Training) -> Any:
    assert run.report is not None
    return run.report


@pytest.mark.reads("muon, reset")
def test_a_preset_is_for_every_part_of_the_chain(runs: Runs) -> None:
    run = ok(runs["muon, reset"])
    muon, adam = _report(run)["optimizers"]
    assert muon["kind"] == "SelectiveFloat16Optimizer over TensorParallelMuon"
    assert adam["kind"] == "SelectiveAdam over FusedAdamStandIn"
    assert list(muon["moments"]["state"]) == ["momentum_buffer"]
    assert list(adam["moments"]["state"]) == ["exp_avg", "exp_avg_sq"]
    for part in (muon, adam):
        for state in part["moments"]["state"].values():
            assert state["rms_after"] == 0.0
    assert (muon["step"]["value"], adam["step"]["value"]) == (None, 0)
    assert all(rate < 1e-4 for _, rate, _ in run.iterations.values())
    assert GUARDED in run.log


@pytest.mark.reads("muon and lion, scaled", "muon and lion, stock again")
def test_a_rule_is_for_the_first_moment_whatever_its_name(runs: Runs) -> None:
    run = ok(runs["muon and lion, scaled"])
    muon, lion = _report(run)["optimizers"]
    assert lion["kind"] == "SelectiveAdam over Lion"
    for part, tensor in ((muon, "momentum_buffer"), (lion, "exp_avg")):
        (state,) = part["moments"]["state"].items()
        assert state[0] == tensor
        assert state[1]["rms_after"] == pytest.approx(state[1]["rms_before"] / 2)
        assert state[1]["rms_before"] > 0.0
    assert GUARDED in run.log
    assert list(ok(runs["muon and lion, stock again"]).iterations) == [6]


@pytest.mark.reads("without, of a layer-wise one")
def test_a_run_without_it_is_refused_by_the_flags_that_there_are(runs: Runs) -> None:
    run = runs["without, of a layer-wise one"]
    assert run.returncode not in (0, 1)
    assert "with Megatron's layer-wise distributed optimizer" in run.log
    assert "Give --optimizer and --use-distributed-optimizer as they were" in run.log
    assert "Traceback" not in run.log
