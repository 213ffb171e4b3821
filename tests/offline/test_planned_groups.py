"""The param_groups of a plan are those of the run, where the arguments change them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from packaging.version import Version

from megatron_ext.offline.forecast import forecast
from megatron_ext.offline.plan_document import document
from tests.support.runs import Runs, Scenario, needs_training, ok, runs_of
from tests.support.training import Zygote

pytestmark = [pytest.mark.e2e, needs_training]

DIST = "--bf16 --use-distributed-optimizer --ckpt-format torch_dist"
PHASE_1 = f"--lr 3e-4 --min-lr 3e-5 --train-iters 4 --lr-decay-iters 20 --qk-layernorm {DIST}"
# Which parameter is in which group shows in the numbers of this rule.
PHASE_2 = (
    f"--lr 3e-5 --min-lr 2e-5 --train-iters 5 --lr-decay-iters 20 --qk-layernorm {DIST} "
    "--optimizer-class megatron_ext.SelectiveAdam --selective-report {report} "
    "--selective-policy tests/support/no_weight_decay.yaml"
)
WIDTH = "--use-mup --mup-base-hidden-size 8"

#: Case -> what it adds to the arguments, and the number of groups.
CASES = {
    "plain": ("", 2),
    "rates of the embedding": ("--decoupled-lr 2e-4 --decoupled-min-lr 1e-5", 3),
    "weight decay of norms": ("--apply-wd-to-qk-layernorm", 2),
    "MuP": (f"{WIDTH} --adam-eps 1e-6", 3),
    "MuP and rates of the embedding": (f"{WIDTH} --decoupled-lr 2e-4", 4),
}
SCENARIOS = {
    "phase 1": Scenario(PHASE_1, saves=True),
    "MuP phase 1": Scenario(f"{PHASE_1} {WIDTH}", saves=True),
    **{case: Scenario(f"{PHASE_2} {more}", "phase 1") for case, (more, _) in CASES.items()},
    "no more MuP": Scenario(PHASE_2, "MuP phase 1"),
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Runs]:
    yield from runs_of(SCENARIOS, request, tmp_path_factory.mktemp("runs"), zygote)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.reads(case)) for case in (*CASES, "no more MuP")],
)
def test_the_groups_are_those_of_the_run(case: str, runs: Runs, megatron: Version) -> None:
    report = ok(runs[case]).report
    assert report is not None
    directory = runs.checkpoint(SCENARIOS[case].loads or "")
    found = forecast(directory, runs.words(case))
    said = document(found)
    assert said["errors"] == []
    assert not [w for w in said["warnings"] if "not known" in w]
    (mine,), (theirs,) = said["optimizers"], report["optimizers"]
    assert len(mine["groups"]) == CASES.get(case, ("", 2))[1]
    assert mine["groups"] == [
        {k: v for k, v in group.items() if k != "parameters_on_rank_0"}
        for group in theirs["groups"]
    ]
    for ours, done in zip(mine["rules"], theirs["moments"]["rules"], strict=True):
        assert (ours["rule"], ours["elements"]) == (done["rule"], done["elements"])
    assert said["scheduler"]["first_step"] == report["scheduler"]["first_step"]
