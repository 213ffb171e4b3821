"""Resumes over TransformerEngine's FusedAdam, in which every pair of factors appears."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.version import Version

from tests.conftest import FIRST, STEPS
from tests.resume.test_policies import ROWS, SECOND, Moments, Oracle, above_quantile, keep, rows
from tests.support import te_extension
from tests.support.cells import chosen
from tests.support.harness import Layout
from tests.support.pairwise import Cell, covering, pairs
from tests.support.pool import RankPool
from tests.support.unsharded import State

pytestmark = pytest.mark.ranks

MORE = 3


def reset(name: str, m: np.ndarray, v: np.ndarray) -> Moments:
    return 0 * m, 0 * v


def gradient_scale(name: str, m: np.ndarray, v: np.ndarray) -> Moments:
    return 0.5 * m, 0.25 * v


POLICIES: dict[str, tuple[str, Oracle]] = {
    "keep": ("{}", keep),
    "reset": ("moments: [{match: '*', exp_avg: reset, exp_avg_sq: reset}]", reset),
    "scale": ("preset: {name: gradient-scale, s: 0.5, decline: [eps, clip_grad]}", gradient_scale),
    "fill rows": (f"moments: [{ROWS}]", rows),
    "prune": ("preset: relora 0.88", above_quantile),
}
#: Largest error of one rounding of exp_avg and of exp_avg_sq, relative to the element and to the
#: tensor's largest.
FP32, BF16, FP16, FP8 = (2e-6, 0.0), (2.0**-8, 0.0), (2.0**-10, 2.0**-24), (2.0**-3, 2.0**-9)
PRECISIONS = {
    "fp32": (FP32, FP32),
    "bf16 exp_avg": (BF16, FP32),
    "bf16": (BF16, BF16),
    "fp16": (FP16, FP16),
    "fp8 and fp16": (FP8, FP16),
    "fp16 masters": (FP32, FP32),
    "remainders": (FP32, FP32),
}
FORMATS = ("dp_reshardable", "fully_reshardable", "torch")
#: FusedAdam has no bf16 moments before 2.4. With such a version fewer cells are run.
OLD = te_extension.available() and Version(te_extension.version()) < Version("2.4")
FACTORS = (
    tuple(p for p in PRECISIONS if not (OLD and p.startswith("bf16"))),
    ("keep", "scale", "prune") if OLD else tuple(POLICIES),
    FORMATS,
    ("1", "2"),
)
CELLS = covering(FACTORS, lambda cell: True)
RAN: list[Cell] = []


class Written:
    """Phase 1 of each layout by stock Megatron, once."""

    def __init__(self, pool: RankPool, directory: Path) -> None:
        self._pool = pool
        self._directory = directory
        self._made: dict[tuple[Layout, int], tuple[str, dict[str, Any]]] = {}

    def __call__(self, layout: Layout, world: int) -> tuple[str, dict[str, Any]]:
        if (layout, world) not in self._made:
            path = str(self._directory / f"iter_{STEPS + len(self._made):07d}")
            run: dict[str, Any] = dict(layout=layout, hyper=FIRST, steps=STEPS, directory=path)
            (found, *_) = self._pool.run("tests.support.old:written", world, **run)
            self._made[layout, world] = (path, found)
        return self._made[layout, world]


@pytest.fixture(scope="module")
def written(stock: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(stock, tmp_path_factory.mktemp("written"))


def assert_moments(found: State, before: State, oracle: Oracle, precision: str) -> int:
    """Every moment against float64, the master weights bit for bit; number of changed elements."""
    changed = 0
    for name, tensors in before.items():
        np.testing.assert_array_equal(found[name]["param"], tensors["param"], err_msg=name)
        m, v = (tensors[key].astype(np.float64) for key in ("exp_avg", "exp_avg_sq"))
        for key, wanted, (rtol, of_largest) in zip(
            ("exp_avg", "exp_avg_sq"), oracle(name, m, v), PRECISIONS[precision], strict=True
        ):
            atol = 1e-20 + of_largest * np.abs(wanted).max()
            np.testing.assert_allclose(found[name][key], wanted, rtol, atol, err_msg=name)
            changed += int((found[name][key] != tensors[key]).sum())
    return changed


def assert_same_steps(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Losses, learning rates and the state after the last step, as stock's."""
    assert found["lrs"] == expected["lrs"]
    assert found["wds"] == expected["wds"]
    assert len(found["losses"]) == MORE
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-6)
    for name, tensors in expected["state"].items():
        for key, value in tensors.items():
            atol = 1e-5 * np.abs(value).max()
            np.testing.assert_allclose(found["final"][name][key], value, 1e-5, atol, err_msg=name)


def assert_next_steps(
    found: dict[str, Any], stock: RankPool, layout: Layout, world: int, policy: str
) -> None:
    """Those of stock, whose moments are corrected by hand where the policy changed them."""
    (expected, *_) = stock.run(
        "tests.support.te_stock:continued",
        world,
        layout=layout,
        first=FIRST,
        second=SECOND,
        steps=STEPS,
        state=None if policy == "keep" else found["state"],
        more=MORE,
    )
    assert_same_steps(found, expected)


@pytest.mark.parametrize("cell", CELLS, ids=", ".join)
def test_a_cell(cell: Cell, stock: RankPool, ext: RankPool, written: Written) -> None:
    precision, policy, form, ranks = cell
    text, oracle = POLICIES[policy]
    layout, world = Layout(precision=precision, format=form), int(ranks)
    directory, before = written(layout, world)
    (found, *_) = ext.run(
        "tests.support.te_runs:resumed",
        world,
        layout=layout,
        hyper=SECOND,
        directory=directory,
        policy=text,
        more=MORE,
    )
    assert found["steps"] == before["steps"] == [STEPS]
    changed = assert_moments(found["state"], before["state"], oracle, precision)
    assert (changed > 0) == (policy != "keep")
    assert found["checked"]  # by the guard
    numbers = sum(tensors["param"].size for tensors in before["state"].values())
    assert found["proven"] == (0 if precision == "remainders" else numbers)
    assert_next_steps(found, stock, layout, world, policy)
    RAN.append(cell)


def test_so_many_cells_ran(request: pytest.FixtureRequest) -> None:
    wanted = {
        (i, a, j, b)
        for (i, left), (j, right) in itertools.combinations(enumerate(FACTORS), 2)
        for a in left
        for b in right
    }
    assert set().union(*map(pairs, CELLS)) == wanted
    assert len(CELLS) == (15 if OLD else 35)
    assert len(RAN) == len(set(RAN)) == chosen(request, test_a_cell)
