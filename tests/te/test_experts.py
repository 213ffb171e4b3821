"""Experts, whose optimizer is one of a chain of two, with Transformer Engine's FusedAdam."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FIRST, STEPS
from tests.resume.test_policies import SECOND
from tests.support.cells import chosen
from tests.support.harness import Layout
from tests.support.pool import RankPool
from tests.te.test_cells import MORE, POLICIES, assert_moments, assert_next_steps

pytestmark = pytest.mark.ranks

#: Precision, policy, format, and how many ranks have how many of the experts.
CELLS = [
    ("bf16", "keep", "dp_reshardable", 2, 2),
    ("bf16 exp_avg", "scale", "fully_reshardable", 2, 2),
    ("fp16", "prune", "fully_reshardable", 2, 2),
    ("fp8 and fp16", "scale", "dp_reshardable", 2, 2),
    ("remainders", "fill rows", "dp_reshardable", 2, 2),
    ("remainders", "keep", "fully_reshardable", 2, 1),
    ("fp16 masters", "reset", "fully_reshardable", 2, 2),
    ("fp32", "keep", "torch", 2, 2),
]
RAN: list[tuple[Any, ...]] = []


@pytest.mark.parametrize(("precision", "policy", "form", "world", "ep"), CELLS)
def test_experts_have_their_moments(
    precision: str,
    policy: str,
    form: str,
    world: int,
    ep: int,
    stock: RankPool,
    ext: RankPool,
    tmp_path: Path,
) -> None:
    layout = Layout(precision=precision, format=form, experts=4, ep=ep)
    text, oracle = POLICIES[policy]
    directory = str(tmp_path / "iter_0000004")
    run: dict[str, Any] = dict(layout=layout, directory=directory)
    (before, *_) = stock.run("tests.support.old:written", world, hyper=FIRST, steps=STEPS, **run)
    (found, *_) = ext.run(
        "tests.support.te_runs:resumed", world, hyper=SECOND, policy=text, more=MORE, **run
    )
    assert sum(".experts." in name for name in found["state"]) == 2 * 2 * 4
    changed = assert_moments(found["state"], before["state"], oracle, precision)
    assert (changed > 0) == (policy != "keep")
    assert found["checked"]
    assert_next_steps(found, stock, layout, world, policy)
    RAN.append((precision, policy, form, world, ep))


def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 8
    assert len(RAN) == len(set(RAN)) == chosen(request, test_experts_have_their_moments)
