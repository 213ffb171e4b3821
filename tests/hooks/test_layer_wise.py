"""Muon with --use-distributed-optimizer: the reason of the refusal is true, its way out works."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.support.runs import Runs, Scenario, needs_training, ok, runs_of
from tests.support.training import Zygote

pytestmark = [
    pytest.mark.e2e,
    needs_training,
    pytest.mark.skipif(
        importlib.util.find_spec("emerging_optimizers") is None,
        reason="Muon needs the package emerging-optimizers",
    ),
]

RUN = (
    "--lr 3e-4 --min-lr 3e-5 --train-iters 6 --lr-decay-iters 20 --bf16 --optimizer muon "
    "--use-distributed-optimizer --ckpt-format torch_dist"
)
SCENARIOS = {
    "phase 1": Scenario(f"{RUN} --exit-interval 4", saves=True, world=2),
    "ours": Scenario(
        f"{RUN} --optimizer-class megatron_ext.SelectiveAdam", "phase 1", world=2, fails=True
    ),
    "the way out": Scenario(RUN, "phase 1", world=2),
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Runs]:
    yield from runs_of(SCENARIOS, request, tmp_path_factory.mktemp("runs"), zygote)


@pytest.mark.reads(*SCENARIOS)
def test_it_is_refused_by_its_reason_and_the_way_out_works(runs: Runs) -> None:
    ours = runs["ours"]
    assert ours.returncode not in (0, 1)
    assert "--optimizer muon and --use-distributed-optimizer" in ours.log
    assert "was written without" not in ours.log
    assert "Leave --optimizer-class out" in ours.log
    assert "Traceback" not in ours.log
    assert list(ok(runs["the way out"]).iterations) == [5, 6]
