"""Resumes in which every pair of layout, format, dtype, policy and Megatron version appears.

A session runs the cells of the installed megatron-core; `make test-matrix` runs the others.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.host import contract
from tests.conftest import FIRST, STEPS, Checkpoints
from tests.resume.test_policies import MORE_POLICIES, POLICIES, assert_is
from tests.resume.test_resume import (
    MORE,
    SECOND,
    assert_same_run,
    assert_same_state,
    assert_worth_comparing,
)
from tests.support.cells import chosen
from tests.support.harness import Layout
from tests.support.pairwise import Cell, covering, pairs
from tests.support.pool import Failure, RankPool

BASE = Layout()
MOE = Layout(experts=4, ep=2)
#: Layout and ranks, without format and dtype.
LAYOUTS = {
    "dp2": (BASE, 2),
    "overlap": (replace(BASE, overlap=True), 2),
    "instances": (replace(BASE, instances=2), 2),
    "tp2": (replace(BASE, tp=2), 2),
    "pp2 vpp2": (replace(BASE, pp=2, vpp=2), 2),
    "experts": (MOE, 4),
    "torch AdamW": (replace(BASE, adam="torch"), 2),
    "not distributed": (replace(BASE, distributed=False), 2),
    "not distributed, experts": (replace(MOE, distributed=False), 2),
}
FORMATS = ("dp_reshardable", "fully_reshardable", "torch")
DTYPES = ("bf16", "fp32", "fp16")
#: Arguments and rules. Unchanged arguments are compared with stock's resume, new ones with a run
#: that was not interrupted, and moments with float64 on the unsharded state.
RESUMES = ("unchanged", "new arguments", "exact rules", "rounded rules")
FACTORS = (tuple(LAYOUTS), FORMATS, DTYPES, RESUMES, contract.TESTED)
RULES = POLICIES | MORE_POLICIES


def saved_wrongly(layout: Layout) -> bool:
    """Whether stock saves other state than the run has, and loads it without a word.

    It slices by offsets with the buckets' padding what it has packed without
    (core/optimizer/distrib_optimizer.py:1376 and :1789, 0.19.2).
    """
    return layout.overlap and layout.format == "fully_reshardable"


def stock_can(cell: Cell) -> bool:
    """Whether stock Megatron saves the cell's checkpoint, and loads it where it is the oracle."""
    name, form, dtype, resume, _ = cell
    layout, _ = LAYOUTS[name]
    if not layout.distributed:
        # Without a distributed optimizer there is one kind of torch_dist checkpoint.
        return form != "fully_reshardable"
    if resume != "unchanged":
        return not saved_wrongly(replace(layout, format=form))
    # Not plain AdamW, and not fp32 through the copies that need no_grad.
    return layout.adam != "torch" and (dtype != "fp32" or form == "fully_reshardable")


CELLS = covering(FACTORS, stock_can)
#: What no cell has: pairs that `stock_can` rules out.
IMPOSSIBLE = {
    (0, "not distributed", 1, "fully_reshardable"),
    (0, "not distributed, experts", 1, "fully_reshardable"),
    (0, "torch AdamW", 3, "unchanged"),
}
OF_THIS_VERSION = [c for c in CELLS if c[-1] == importlib.metadata.version("megatron-core")]
RAN: list[Cell] = []


def test_every_pair_of_values_is_covered() -> None:
    wanted = {
        (i, a, j, b)
        for (i, left), (j, right) in itertools.combinations(enumerate(FACTORS), 2)
        for a in left
        for b in right
    }
    found = set().union(*map(pairs, CELLS))
    assert wanted - found == IMPOSSIBLE
    assert found <= wanted
    assert len(CELLS) == len(set(CELLS)) == 37
    assert all(map(stock_can, CELLS))


@pytest.mark.ranks
@pytest.mark.matrix
@pytest.mark.parametrize("cell", OF_THIS_VERSION, ids=", ".join)
def test_a_cell(
    cell: Cell, stock: RankPool, ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    name, form, dtype, resume, _ = cell
    layout, world = LAYOUTS[name]
    layout = replace(layout, format=form, dtype=dtype)
    if resume.endswith("rules"):
        assert_rules(layout, world, resume == "exact rules", stock, ext, tmp_path)
    else:
        assert_arguments(layout, world, resume == "unchanged", stock, ext, checkpoints)
    RAN.append(cell)


def assert_arguments(
    layout: Layout,
    world: int,
    unchanged: bool,
    stock: RankPool,
    ext: RankPool,
    checkpoints: Checkpoints,
) -> None:
    directory, saved = checkpoints.phase_1(layout, world)
    hyper = FIRST if unchanged else SECOND
    run: dict[str, Any] = dict(layout=layout, hyper=hyper, directory=directory, more=MORE)
    if saved_wrongly(layout):
        refused = ext.run("tests.support.subject:resume", world, allow_failure=True, **run)
        assert all(isinstance(one, Failure) for one in refused)
        assert {one.type for one in refused} <= {"CheckpointError", "AgreementError"}
        assert all("stores shifted tensors as fully_reshardable" in one.message for one in refused)
        return
    if unchanged:
        expected = stock.run("tests.support.oracle:stock_resume", world, **run)
    else:
        expected = stock.run(
            "tests.support.oracle:uninterrupted",
            world,
            layout=layout,
            first=FIRST,
            second=SECOND,
            steps=STEPS,
            more=MORE,
        )
    found = ext.run("tests.support.subject:resume", world, **run)
    for before, ours, theirs in zip(saved, found, expected, strict=True):
        assert_worth_comparing(before)
        assert_same_state(ours["loaded"], theirs["loaded"] if unchanged else before)
        assert_same_run(ours, theirs)
        if unchanged:
            assert ours["loaded"]["groups"] == theirs["loaded"]["groups"]


def assert_rules(
    layout: Layout, world: int, exactly: bool, stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    directory = str(tmp_path / f"iter_{STEPS:07d}")
    run: dict[str, Any] = dict(layout=layout, directory=directory)
    (saved, *_) = stock.run("tests.support.old:written", world, hyper=FIRST, steps=STEPS, **run)
    policies = {name: text for name, (text, _, exact) in RULES.items() if exact == exactly}
    (found, *_) = ext.run(
        "tests.support.policies:resumed", world, hyper=SECOND, policies=policies, **run
    )
    for name in policies:
        _, oracle, exact = RULES[name]
        changed = assert_is(found[name]["state"], saved["state"], oracle, exact)
        assert (changed > 0) == (name != "keep")
        assert found[name]["steps"] == saved["steps"] == [STEPS]


@pytest.mark.ranks
@pytest.mark.matrix
def test_every_cell_of_this_version_ran(request: pytest.FixtureRequest) -> None:
    assert len(RAN) == len(set(RAN)) == chosen(request, test_a_cell)
    # A version without cells would pass without a resume.
    assert len(OF_THIS_VERSION) >= len(LAYOUTS)
    assert {name for name, *_ in OF_THIS_VERSION} == set(LAYOUTS)
