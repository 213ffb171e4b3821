"""State that does not belong to the weights is refused, in whatever precision it is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FIRST, STEPS
from tests.resume.test_policies import SECOND
from tests.support.cells import chosen
from tests.support.harness import Layout
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

#: What is stored -> the layout of the checkpoint and of the run.
STATES = {
    "bf16": Layout(precision="bf16"),
    "fp16": Layout(precision="fp16", format="fully_reshardable"),
    "fp8 and fp16": Layout(precision="fp8 and fp16", format="torch"),
    "remainders": Layout(precision="remainders", format="fully_reshardable"),
    "int16 remainders": Layout(precision="remainders"),
    "fp16 masters": Layout(precision="fp16 masters"),
    "fp16 masters of fp16 weights": Layout(precision="fp16 masters", dtype="fp16", format="torch"),
    "offload": Layout(adam="offload", format="torch"),
    "overlapped offload": Layout(adam="overlapped offload"),
}
#: What is wrong -> where it is noticed, as which error, and what that says.
CASES = {
    "right": ("", "step", ""),
    "foreign": ("CheckpointError", "load", "master weights are not the weights that the model has"),
    "negative": ("CheckpointError", "load", "1 of exp_avg_sq negative"),
    "moment": ("GuardError", "step", "exp_avg has norm"),
}
CELLS = [(state, case) for state in STATES for case in CASES]
RAN: list[tuple[str, str]] = []


@pytest.fixture(scope="module")
def saved(stock: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of each layout by stock, once."""
    made: dict[Layout, str] = {}

    def save(layout: Layout) -> str:
        if layout not in made:
            path: Path = tmp_path_factory.mktemp("saved") / "iter_0000004"
            run: dict[str, Any] = dict(layout=layout, hyper=FIRST, steps=STEPS)
            stock.run("tests.support.te_stock:saved", 2, directory=str(path), **run)
            made[layout] = str(path)
        return made[layout]

    return save


@pytest.mark.parametrize(("state", "case"), CELLS)
def test_wrong_state_is_refused_and_right_state_passes(
    state: str, case: str, ext: RankPool, saved: Any
) -> None:
    layout, (error, where, said) = STATES[state], CASES[case]
    run: dict[str, Any] = dict(layout=layout, hyper=SECOND, directory=saved(layout))
    found = ext.run("tests.support.proof_cases:judged", 2, what=case, **run)
    halves = layout.precision == "remainders"
    if halves and case == "foreign":  # the low bits of a weight fit any weight
        error, where = "", "step"
    assert found[0]["type"] == error, found[0]
    assert found[0]["where"] == where
    if error:
        assert said in found[0]["message"]
        assert found[1]["type"] == ("AgreementError" if where == "load" else error)
    else:
        for rank in found:
            assert rank["proven"] == (0 if halves else rank["elements"] > 0 and rank["elements"])
            assert rank["checked"]
            (line,) = (x for x in rank["lines"] if "are proven to be the model's weights" in x)
            assert ("remainders, which fit any weights" in line) == halves
    RAN.append((state, case))


def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 36
    wanted = chosen(request, test_wrong_state_is_refused_and_right_state_passes)
    assert len(RAN) == len(set(RAN)) == wanted
