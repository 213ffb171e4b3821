"""A grown vocabulary: old rows in place, new rows as initialised, their moments by the rules."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from megatron_ext.plan.cautions import fresh_update
from tests.conftest import FIRST, STEPS
from tests.support.cells import chosen, of_every_version
from tests.support.harness import Hyper, Layout
from tests.support.pool import ROOT, RankPool

SECOND = Hyper(lr=1e-3, min_lr=1e-4, betas=(0.8, 0.9), eps=1e-6, train_iters=60)
MORE = 2

SCHEMA = jsonschema.Draft202012Validator(
    json.loads((ROOT / "megatron_ext/schemas/resume-report.schema.json").read_text())
)

Found = dict[str, Any]

#: 20 is no power of two: the data-parallel cuts fall within rows.
BF16 = Layout(format="fully_reshardable", hidden=20, layers=2)
PLAIN = replace(BF16, distributed=False)
#: Buckets that need no padding. Stock saves fully_reshardable wrongly where one does and another
#: follows: it slices by offsets with padding what it has packed without
#: (core/optimizer/distrib_optimizer.py:1376 and :1789, 0.19.2).
UNPADDED = replace(BF16, hidden=128)


def grown(layout: Layout, before: int, after: int, **target: Any) -> tuple[Layout, Layout]:
    return replace(layout, vocab=before), replace(layout, vocab=after, **target)


#: Name -> layout and ranks before and after. The first new row lies within a rank's rows, between
#: two ranks, or before all rows of a rank.
CELLS: dict[str, tuple[tuple[Layout, Layout], int, int]] = {
    "tp 1": (grown(BF16, 40, 50), 1, 2),
    # Large enough for the data-parallel cuts to lie within the embedding and the output layer.
    "dp 4": (grown(BF16, 400, 600), 1, 4),
    "tp 2": (grown(replace(BF16, tp=2), 40, 96), 2, 4),
    "tp 1 to 2": (grown(BF16, 40, 56, tp=2), 1, 2),
    "tp 2 to 1": (grown(replace(BF16, tp=2), 56, 90, tp=1), 2, 2),
    "tp 1 to 2, at the cut": (grown(BF16, 40, 80, tp=2), 1, 2),
    "padding": (grown(BF16, 41, 42, tp=2), 1, 2),
    "tied": (grown(replace(BF16, tied=True), 40, 56, tp=2), 1, 2),
    "pp 2": (grown(replace(BF16, pp=2), 40, 64), 2, 2),
    "pp 2 tied": (grown(replace(UNPADDED, pp=2, tied=True), 40, 64), 2, 2),
    "pp 2, tp 2": (grown(replace(BF16, pp=2), 40, 96, tp=2), 2, 4),
    "experts": (grown(replace(BF16, experts=4), 40, 64), 1, 2),
    "overlap": (grown(replace(UNPADDED, overlap=True), 40, 64), 2, 2),
    "not distributed, tp 1": (grown(PLAIN, 40, 50), 1, 2),
    "not distributed, tp 1 to 2": (grown(PLAIN, 40, 96, tp=2), 1, 2),
    "not distributed, tp 2 to 1": (grown(replace(PLAIN, tp=2), 56, 90, tp=1), 2, 1),
    "not distributed, pp 2": (grown(replace(PLAIN, pp=2), 40, 64), 2, 2),
    "not distributed, fp32": (grown(replace(PLAIN, dtype="fp32"), 40, 56, tp=2), 1, 2),
    "fp32": (grown(replace(BF16, dtype="fp32"), 40, 56, tp=2), 1, 2),
    "parallel load": (grown(BF16, 40, 56, tp=2, parallel_load=True), 1, 4),
    "parallel load, not distributed": (grown(PLAIN, 40, 96, tp=2, parallel_load=True), 1, 4),
    "adamw": (grown(replace(BF16, adam="torch"), 40, 56, tp=2), 1, 2),
}
#: With those of every version, what places rows in another way; the others are run with --all.
CHOSEN = {
    "dp 4",
    "padding",
    "pp 2 tied",
    "experts",
    "not distributed, fp32",
    "adamw",
}
#: Run with every policy without --all too; the others with `keep` and two more.
IN_FULL = {"tp 1 to 2", "not distributed, tp 1 to 2"}
#: Stock cannot load these at all (README.md, "also").
STOCK_FAILS = {"fp32", "adamw"}

_executed: list[tuple[str, str]] = []


BOTH = "re:.*(word_embeddings|output_layer)[.]weight"
Moments = tuple[np.ndarray, np.ndarray]
Oracle = Callable[[str, np.ndarray, np.ndarray, int], Moments]


def rule(match: str, m: str, v: str) -> str:
    return f"moments: [{{match: '{match}', exp_avg: {m}, exp_avg_sq: {v}}}]"


def resized(name: str) -> bool:
    return name.endswith(("word_embeddings.weight", "output_layer.weight"))


def keep(name: str, m: np.ndarray, v: np.ndarray, n: int) -> Moments:
    return m, v


def by_column(name: str, m: np.ndarray, v: np.ndarray, n: int) -> Moments:
    v = v.copy()
    if resized(name):
        v[n:] = v[:n].mean(0)
    return m, v


def late_rows(name: str, m: np.ndarray, v: np.ndarray, n: int) -> Moments:
    """The first new row has no rule: it is kept, but it is not old."""
    m, v = m.copy(), v.copy()
    if resized(name):
        m[n + 1 :] = m[:n].mean(0)
        v[n + 1 :] = v[:n].mean()
    return m, v


def all_rows(name: str, m: np.ndarray, v: np.ndarray, n: int) -> Moments:
    if not resized(name):
        return m, v
    return np.broadcast_to(m[:n].mean(0), m.shape), np.full_like(v, v[:n].mean())


def reset(name: str, m: np.ndarray, v: np.ndarray, n: int) -> Moments:
    return (0 * m, 0 * v) if resized(name) else (m, v)


def above_quantile(name: str, m: np.ndarray, v: np.ndarray, n: int) -> Moments:
    def kept(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) > np.quantile(np.abs(x[:n]), 0.88, method="lower"), x, 0)

    return kept(m), kept(v)


def policies(n: int) -> dict[str, tuple[str, Oracle]]:
    """Name -> policy for n old rows, and what it makes of the moments in float64."""
    return {
        "keep": ("{}", keep),
        "column-mean": (rule(f"{BOTH}[{n}:]", "reset", "fill column-mean"), by_column),
        "late rows": (rule(f"{BOTH}[{n + 1}:]", "fill column-mean", "fill mean"), late_rows),
        "all rows": (rule(BOTH, "fill column-mean", "fill mean"), all_rows),
        "reset": (rule(BOTH, "reset", "reset"), reset),
        "relora": ("preset: relora 0.88", above_quantile),
    }


def policies_of(cell: str, everything: bool) -> dict[str, tuple[str, Oracle]]:
    """The policies that a cell is run with."""
    (source, target), _, _ = CELLS[cell]
    some = policies(source.vocab)
    if target.vocab - source.vocab == 1:
        del some["late rows"]
    if everything or cell in IN_FULL:
        return some
    keep, *others = some
    first = 2 * list(CELLS).index(cell)
    return {n: some[n] for n in (keep, *(others[(first + k) % len(others)] for k in (0, 1)))}


class PhaseOne:
    """Phase 1 of each layout, by stock Megatron, once; what it was, unsharded."""

    def __init__(self, pool: RankPool, directory: Path) -> None:
        self._pool = pool
        self._directory = directory
        self._made: dict[tuple[Layout, int], tuple[str, Found]] = {}

    def __call__(self, layout: Layout, world: int) -> tuple[str, Found]:
        if (layout, world) not in self._made:
            path = str(self._directory / f"phase1-{len(self._made)}")
            found = self._pool.run(
                "tests.support.vocabulary_stock:phase_1",
                world,
                layout=layout,
                hyper=FIRST,
                steps=STEPS,
                directory=path,
            )[0]
            self._made[layout, world] = (path, found)
        return self._made[layout, world]


@pytest.fixture(scope="module")
def phase_1(stock: RankPool, tmp_path_factory: pytest.TempPathFactory) -> PhaseOne:
    return PhaseOne(stock, tmp_path_factory.mktemp("vocabulary"))


def assert_rows(found: np.ndarray, old: np.ndarray, new: np.ndarray, name: str) -> int:
    """Old rows, then new ones, bit for bit; number of new elements."""
    n = min(len(old), len(new))
    np.testing.assert_array_equal(found[:n], old[:n], err_msg=name)
    np.testing.assert_array_equal(found[n:], new[n:], err_msg=name)
    return found[n:].size


def cut(found: Found, rows: int) -> Found:
    """The first rows of what was resized."""

    def some(name: str, array: np.ndarray) -> np.ndarray:
        return array[:rows] if resized(name) else array

    return {
        "weights": {n: some(n, w) for n, w in found["weights"].items()},
        "state": {
            n: {k: some(n, t) for k, t in tensors.items()} for n, tensors in found["state"].items()
        },
    }


def assert_loaded(found: Found, before: Found, fresh: Found, oracle: Oracle) -> int:
    """Every element of weights, master weights and moments; number of new elements."""
    assert set(found["state"]) == set(before["state"])
    new = 0
    for name, weight in found["weights"].items():
        old, initial = before["weights"][name], fresh["weights"][name]
        new += assert_rows(weight, old, initial if resized(name) else old, name)
    for name, tensors in found["state"].items():
        old, initial = before["state"][name], fresh["state"][name]
        master = initial["param"] if resized(name) else old["param"]
        assert_rows(tensors["param"], old["param"], master, name)
        n = len(old["param"])
        m, v = (np.zeros(tensors["param"].shape) for _ in range(2))
        m[:n], v[:n] = old["exp_avg"][:n], old["exp_avg_sq"][:n]
        wanted = dict(zip(("exp_avg", "exp_avg_sq"), oracle(name, m, v, n), strict=True))
        for key, value in wanted.items():
            if oracle in (keep, reset, above_quantile):
                np.testing.assert_array_equal(tensors[key], value.astype(np.float32), err_msg=name)
            else:
                np.testing.assert_allclose(
                    tensors[key], value, rtol=2e-6, atol=1e-20, err_msg=f"{name} {key}"
                )
    return new


@pytest.mark.ranks
@pytest.mark.parametrize(
    "cell", of_every_version(CELLS, ["tp 1 to 2"], CHOSEN | {"not distributed, tp 1 to 2"})
)
def test_old_rows_are_in_place_and_new_ones_as_initialised(
    cell: str,
    stock: RankPool,
    ext: RankPool,
    phase_1: PhaseOne,
    pytestconfig: pytest.Config,
) -> None:
    (source, target), world_before, world = CELLS[cell]
    directory, before = phase_1(source, world_before)
    fresh = stock.run("tests.support.vocabulary_stock:fresh", world, layout=target, hyper=SECOND)[0]
    some = policies_of(cell, pytestconfig.getoption("--all"))
    found = ext.run(
        "tests.support.vocabulary:resumed",
        world,
        layout=target,
        hyper=SECOND,
        directory=directory,
        policies={name: text for name, (text, _) in some.items()},
    )[0]
    matrices = sum(resized(name) for name in before["weights"])
    assert matrices == (1 if source.tied and source.pp == 1 else 2)
    for name, (_, oracle) in some.items():
        new = assert_loaded(found[name], before, fresh, oracle)
        assert new == matrices * (target.vocab - source.vocab) * target.hidden
        assert found[name]["steps"] == [STEPS]
        assert_reported(found[name], source.vocab, target.vocab, 1 if source.tied else 2)
        assert_warned(found[name], name, source.vocab, target.vocab - source.vocab)
        _executed.append((cell, name))
    if cell in STOCK_FAILS:
        return
    corrected = stock.run(
        "tests.support.vocabulary_stock:corrected",
        world,
        layout=target,
        hyper=FIRST,
        directory=directory,
        saved_rows=source.vocab,
        steps=MORE,
    )[0]
    trained = ext.run(
        "tests.support.vocabulary:resumed",
        world,
        layout=target,
        hyper=FIRST,
        directory=directory,
        policies={"keep": "{}"},
        steps=MORE,
    )[0]["keep"]["trained"]
    assert trained["losses"] == corrected["losses"]
    assert_equal(trained, corrected)
    if target.dtype == "bf16":
        assert_rounded(trained)


def assert_equal(found: Found, wanted: Found) -> None:
    for name, weight in wanted["weights"].items():
        np.testing.assert_array_equal(found["weights"][name], weight, err_msg=name)
    for name, tensors in wanted["state"].items():
        for key, value in tensors.items():
            np.testing.assert_array_equal(found["state"][name][key], value, err_msg=name)


def assert_rounded(trained: Found) -> None:
    """The model's weights are the master weights, rounded to bf16."""
    import torch

    for name, tensors in trained["state"].items():
        rounded = torch.from_numpy(tensors["param"]).bfloat16().float().numpy()
        np.testing.assert_array_equal(trained["weights"][name], rounded, err_msg=name)


def assert_reported(found: Found, before: int, now: int, matrices: int) -> None:
    SCHEMA.validate(found["report"])
    reported = [one for o in found["report"]["optimizers"] for one in o["resized"]]
    assert len(reported) == matrices
    for one in reported:
        assert resized(one["parameter"])
        assert (one["checkpoint_rows"], one["rows"]) == (before, now)
        assert (one["new_rows"], one["dropped_rows"]) == (
            max(now - before, 0),
            max(before - now, 0),
        )
    told = [
        line for line in found["lines"] if f"{before} rows in the checkpoint, {now} now" in line
    ]
    assert len(told) == matrices


def assert_warned(found: Found, policy: str, before: int, new: int) -> None:
    """Of new rows without second moments, with the first update's number and the remedy."""
    bare = {"keep": new, "relora": new, "late rows": 1}.get(policy, 0)
    warnings = [w for o in found["report"]["optimizers"] for w in o["warnings"]]
    of_rows = [w for w in warnings if "new rows are 0" in w]
    assert bool(of_rows) == bool(bare)
    for warning in of_rows:
        assert f"the moments of {bare} new rows" in warning
        assert f"{fresh_update(SECOND.betas, STEPS):.2f} lr" in warning
        assert f"[{before}:]' reset 'fill column-mean'" in warning


@pytest.mark.ranks
def test_so_many_cells_ran(request: pytest.FixtureRequest) -> None:
    if not _executed:
        pytest.skip("the matrix was deselected")
    ran = chosen(request, test_old_rows_are_in_place_and_new_ones_as_initialised)
    everything = request.config.getoption("--all")
    cells = dict(_executed)
    assert len(cells) == ran
    assert _executed == [(cell, name) for cell in cells for name in policies_of(cell, everything)]
    assert set(policies_of("tp 1 to 2", everything)) == set(policies(1))
    assert all(len(policies_of(cell, everything)) >= 3 for cell in cells)
    assert (len(CELLS), len(CHOSEN)) == (22, 6)


@pytest.mark.ranks
@pytest.mark.parametrize("cell", ["tp 1 to 2", "not distributed, tp 1 to 2"])
def test_stock_fills_the_new_rows_with_zeros(cell: str, stock: RankPool, phase_1: PhaseOne) -> None:
    """The behaviour of upstream that this is for."""
    (source, target), world_before, world = CELLS[cell]
    directory, before = phase_1(source, world_before)
    found = stock.run(
        "tests.support.vocabulary_stock:loaded",
        world,
        layout=target,
        hyper=FIRST,
        directory=directory,
    )[0]
    zeros = {
        "weights": {n: np.zeros_like(w) for n, w in found["weights"].items()},
        "state": {
            n: {k: np.zeros_like(t) for k, t in s.items()} for n, s in found["state"].items()
        },
    }
    assert assert_loaded(found, before, zeros, keep) > 0


@pytest.mark.ranks
@pytest.mark.parametrize(
    "layout", [BF16, PLAIN, replace(BF16, pp=2)], ids=["distributed", "not distributed", "pp 2"]
)
def test_fewer_rows_are_what_stock_makes_of_them(
    layout: Layout, stock: RankPool, ext: RankPool, phase_1: PhaseOne
) -> None:
    (source, target), world_before, world = grown(layout, 64, 40), 2, 2
    directory, before = phase_1(source, world_before)
    arguments: dict[str, Any] = {"layout": target, "directory": directory}
    wanted = stock.run("tests.support.vocabulary_stock:loaded", world, hyper=FIRST, **arguments)[0]
    found = ext.run(
        "tests.support.vocabulary:resumed", world, hyper=SECOND, policies={"": "{}"}, **arguments
    )[0][""]
    assert_equal(found, wanted)
    assert_loaded(found, cut(before, 40), cut(before, 40), keep)
    assert_reported(found, 64, 40, 2)
    (one,) = found["report"]["optimizers"]
    dropped = [w for w in one["warnings"] if "the 24 rows [40:] of the checkpoint are dropped" in w]
    assert len(dropped) == 2


REFUSED = {
    "dp_reshardable": (grown(replace(BF16, format="dp_reshardable"), 40, 64), 2, 2),
    "fewer rows": (grown(replace(BF16, format="dp_reshardable"), 64, 40), 2, 2),
    "padding": (grown(replace(BF16, format="dp_reshardable", tp=2), 40, 42), 2, 2),
    "pp 2": (grown(replace(BF16, format="dp_reshardable", pp=2), 40, 64), 2, 2),
    # Two stages have neither embedding nor output layer.
    "pp 4": (grown(replace(BF16, format="dp_reshardable", pp=4, layers=4), 40, 64), 4, 4),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", REFUSED)
def test_buckets_of_another_size_are_refused_on_every_rank(
    name: str, ext: RankPool, phase_1: PhaseOne
) -> None:
    (source, target), world_before, world = REFUSED[name]
    directory, _ = phase_1(source, world_before)
    results = ext.run(
        "tests.support.vocabulary:refused",
        world,
        timeout=80,
        layout=target,
        hyper=SECOND,
        directory=directory,
    )
    for rank, result in enumerate(results):
        at_the_ends = name != "pp 4" or rank in (0, 3)
        assert result["type"] == ("CheckpointError" if at_the_ends else "AgreementError")
        for word in (
            "dp_reshardable",
            f"{source.vocab} rows there, {target.vocab} here",
            "--dist-ckpt-optim-fully-reshardable",
            "--no-load-optim",
        ):
            assert word in result["message"]
        assert result["unchanged"]
        assert result["in step"]


@pytest.mark.ranks
def test_only_a_resized_vocabulary_costs_a_gather(ext: RankPool, phase_1: PhaseOne) -> None:
    (source, target), world_before, world = CELLS["pp 2"]
    directory, _ = phase_1(source, world_before)

    def seen(layout: Layout) -> list[str]:
        arguments: dict[str, Any] = {"layout": layout, "hyper": SECOND, "directory": directory}
        found = ext.run("tests.support.policies:reductions", world, policy="{}", **arguments)
        assert all(f == found[0] for f in found)
        return list(found[0])

    state, rest = "all_reduce 40", "all_reduce 40"  # what each rank has read by then
    assert seen(source) == [state, "all_reduce 24", rest, "all_reduce 40", "all_reduce 112"]
    more = [state, "all_reduce 24", "gather", rest]  # there are other elements than are stored
    assert seen(target) == [*more, "all_reduce 40", "gather", "all_reduce 112"]


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [BF16, PLAIN], ids=["distributed", "not distributed"])
def test_a_later_load_of_the_same_size_keeps_no_rows(
    layout: Layout, ext: RankPool, phase_1: PhaseOne
) -> None:
    source, target = grown(layout, 40, 64)
    small, _ = phase_1(source, 2)
    same, wanted = phase_1(target, 2)
    found = ext.run(
        "tests.support.vocabulary:loaded_twice",
        2,
        layout=target,
        hyper=SECOND,
        directory=small,
        other=same,
    )[0]
    assert_equal(found, wanted)
    assert [one for o in found["report"]["optimizers"] for one in o["resized"]] == []
