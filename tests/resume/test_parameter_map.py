"""Resumes of a model that differs from the checkpoint's, against a state that is mapped by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.offline.convert import convert
from tests.conftest import FIRST, STEPS
from tests.support.cells import chosen, of_every_version
from tests.support.harness import Layout
from tests.support.pool import RankPool

MORE = 2
FULL = Layout(format="fully_reshardable")
PLAIN = replace(FULL, distributed=False)

#: The parameter of the checkpoint that a current one's weights and moments come from.
Source = Callable[[str], tuple[str | None, str | None]]


def same(name: str) -> tuple[str | None, str | None]:
    return name, name


def new(pattern: str, weights: bool = False) -> Source:
    """Matching parameters have no moments, and weights only if they are in the checkpoint."""

    def source(name: str) -> tuple[str | None, str | None]:
        if re.search(pattern, name):
            return (name if weights else None), None
        return name, name

    return source


def copied(pattern: str, by: str | Callable[[re.Match[str]], str]) -> Source:
    def source(name: str) -> tuple[str | None, str | None]:
        found = re.sub(pattern, by, name)
        return found, found

    return source


@dataclass(frozen=True)
class Cell:
    """Two phases: layouts, ranks, the policy, and where the state has to come from."""

    before: Layout
    after: Layout
    policy: str
    source: Source
    worlds: tuple[int, int] = (1, 1)


def layers(text: str) -> Callable[[re.Match[str]], str]:
    """Replace the layer's number by an expression of it."""
    return lambda found: f"layers.{eval(text, {'n': int(found[1])})}."


def chain(*sources: Source) -> Source:
    """The first source that does not give a parameter its own state."""

    def source(name: str) -> tuple[str | None, str | None]:
        return next((s(name) for s in sources if s(name) != (name, name)), (name, name))

    return source


def policy(**parameters: Any) -> str:
    return json.dumps({"parameters": parameters})


ALL = policy(new=["*"])
UNTIE = policy(copies=[{"to": "output_layer.weight", "from": "embedding.word_embeddings.weight"}])
DEEPER = policy(copies=[{"to": "decoder.layers.{n}.*", "from": "decoder.layers.{n-2}.*"}])
TWICE = policy(copies=[{"to": "decoder.layers.{n}.*", "from": "decoder.layers.{n//2}.*"}])
EXPERT = r"layers\.(\d+)\.mlp\.experts\.local_experts\.\d+\."
MOE = policy(
    new=["*.mlp.router.*"],
    copies=[
        {
            "to": "decoder.layers.{n}.mlp.experts.local_experts.{e}.*",
            "from": "decoder.layers.{n}.mlp.*",
        }
    ],
)
SWAPPED = policy(
    copies=[
        {
            "to": "re:decoder.layers.(?P<n>[01])[.](?P<rest>.*)",
            "from": "decoder.layers.{1-n}.{rest}",
        }
    ]
)
GATED = replace(FULL, gated=True)
#: An MLP of the same shape as each expert's, which has no biases.
DENSE = replace(GATED, bias=False)
SPARSE = replace(FULL, experts=4)
THAW = new("^(?!embedding)", weights=True)
SWAP = new(r"layers\.1\.", weights=True)
ONE_LAYER = r"layers\.0\."
BOTH = copied(r"layers\.([23])\.", layers("n-2"))
HALF = copied(r"layers\.(\d)\.", layers("n//2"))
UNTIED = copied("^output_layer.weight", "embedding.word_embeddings.weight")
CELLS = {
    "thaw": Cell(replace(FULL, trained="embedding"), FULL, ALL, THAW),
    "thaw, 2 ranks": Cell(replace(FULL, trained="embedding"), FULL, ALL, THAW, (2, 2)),
    "thaw, tp 1 to 2": Cell(
        replace(FULL, trained="embedding"), replace(FULL, tp=2), ALL, THAW, (1, 2)
    ),
    "thaw, not distributed": Cell(replace(PLAIN, trained="embedding"), PLAIN, ALL, THAW),
    "thaw the output layer": Cell(
        replace(FULL, trained="^(?!.*output_layer)"),
        FULL,
        policy(new=["output_layer.*"]),
        new("^output_layer", weights=True),
    ),
    "freeze": Cell(FULL, replace(FULL, trained="embedding"), "{}", same),
    "freeze, 2 ranks": Cell(FULL, replace(FULL, trained="embedding"), "{}", same, (1, 2)),
    "freeze one layer": Cell(FULL, replace(FULL, trained=r"layers\.1\."), "{}", same),
    "freeze one layer, pp 2": Cell(
        replace(FULL, layers=4),
        replace(FULL, layers=4, pp=2, trained=r"layers\.0\."),  # a number on its stage
        "{}",
        same,
        (1, 2),
    ),
    "thaw one layer": Cell(
        replace(FULL, trained=r"layers\.0\.|output", by_layer=True),
        replace(FULL, by_layer=True),
        ALL,
        new(r"layers\.1\.|embedding|final", weights=True),
    ),
    "one layer, then the other": Cell(
        replace(FULL, trained=r"layers\.0\.", by_layer=True),
        replace(FULL, trained=r"layers\.1\."),
        ALL,
        SWAP,
        (2, 2),
    ),
    "freeze one layer, not distributed": Cell(
        PLAIN, replace(PLAIN, trained=r"layers\.1\."), "{}", same
    ),
    "a stage that trains nothing": Cell(
        replace(FULL, format="dp_reshardable", pp=2, trained="output_layer"),
        replace(FULL, format="dp_reshardable", pp=2, trained="output_layer"),
        "{}",
        same,
        (2, 2),
    ),
    # Stock stores no step then.
    "a stage that trains nothing, by name": Cell(
        replace(FULL, pp=2, trained="output_layer"),
        replace(FULL, pp=2, trained="output_layer"),
        json.dumps({"step": STEPS}),
        same,
        (2, 2),
    ),
    "mtp added": Cell(
        replace(FULL, rope=True), replace(FULL, mtp=1), policy(new=["mtp.*"]), new("^mtp")
    ),
    "mtp removed": Cell(
        replace(FULL, mtp=1), replace(FULL, rope=True), policy(drop=["mtp.*"]), same
    ),
    "untied": Cell(replace(FULL, tied=True), FULL, UNTIE, UNTIED),
    "untied, tp 1 to 2": Cell(replace(FULL, tied=True), replace(FULL, tp=2), UNTIE, UNTIED, (1, 2)),
    "untied, not distributed": Cell(replace(PLAIN, tied=True), PLAIN, UNTIE, UNTIED),
    "tied": Cell(FULL, replace(FULL, tied=True), policy(drop=["output_layer.weight"]), same),
    "q and k norms": Cell(
        FULL, replace(FULL, qk_norm=True), policy(new=["*_layernorm.*"]), new("[qk]_layernorm")
    ),
    "deeper": Cell(FULL, replace(FULL, layers=4), DEEPER, BOTH),
    "deeper, 2 ranks, gated": Cell(GATED, replace(GATED, layers=4), DEEPER, BOTH, (2, 2)),
    "deeper, pp 2": Cell(FULL, replace(FULL, pp=2), TWICE, HALF, (1, 2)),
    "deeper, not distributed": Cell(PLAIN, replace(PLAIN, layers=4), DEEPER, BOTH),
    "renamed": Cell(FULL, FULL, SWAPPED, copied(r"layers\.([01])\.", layers("1-n")), (1, 2)),
    "distributed off": Cell(FULL, PLAIN, "{}", same, (2, 2)),
    "distributed on": Cell(PLAIN, FULL, "{}", same, (2, 2)),
    "distributed off, fp32": Cell(
        replace(FULL, dtype="fp32"), replace(PLAIN, dtype="fp32"), "{}", same
    ),
    "distributed on, fp32": Cell(
        replace(PLAIN, dtype="fp32"), replace(FULL, dtype="fp32"), "{}", same
    ),
    "distributed on, torch AdamW": Cell(
        replace(PLAIN, adam="torch"), replace(FULL, adam="torch"), "{}", same
    ),
    "distributed off, torch AdamW": Cell(
        replace(FULL, adam="torch"), replace(PLAIN, adam="torch"), "{}", same
    ),
    "experts": Cell(
        DENSE,
        replace(FULL, experts=4),
        MOE,
        chain(copied(EXPERT, r"layers.\1.mlp."), new("router")),
    ),
    "experts, ep 2": Cell(
        DENSE,
        replace(FULL, experts=4, ep=2),
        MOE,
        chain(copied(EXPERT, r"layers.\1.mlp."), new("router")),
        (1, 2),
    ),
    # The model is the same, and its optimizer is a chain or is not.
    "experts spread": Cell(SPARSE, replace(SPARSE, ep=2), "{}", same, (1, 2)),
    "experts on one rank": Cell(replace(SPARSE, ep=2), SPARSE, "{}", same, (2, 1)),
    "experts spread, not distributed": Cell(
        replace(SPARSE, distributed=False),
        replace(SPARSE, distributed=False, ep=2),
        "{}",
        same,
        (1, 2),
    ),
}
#: With the older versions of Megatron too.
EVERY_VERSION = ("thaw, 2 ranks", "deeper, 2 ranks, gated", "distributed on", "freeze one layer")
RAN: list[str] = []


def expected(cell: Cell, saved: dict[str, Any], initial: dict[str, np.ndarray]) -> dict[str, Any]:
    """The state after the load: float32 arrays by global name."""
    state, weights = {}, {}
    for name, first in initial.items():
        of_weights, of_moments = cell.source(name)
        weights[name] = first if of_weights is None else saved["weights"][of_weights]
        moments = saved["state"].get(of_moments)
        zeros = np.zeros_like(first)
        masters = saved["state"].get(of_weights)
        state[name] = {
            "param": weights[name] if masters is None else masters["param"],
            "exp_avg": zeros if moments is None else moments["exp_avg"],
            "exp_avg_sq": zeros if moments is None else moments["exp_avg_sq"],
        }
    return {"state": state, "weights": weights}


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert set(found["weights"]) == set(wanted["weights"])
    for name, weight in found["weights"].items():
        np.testing.assert_array_equal(weight, wanted["weights"][name], err_msg=name)
    assert found["state"]
    for name, state in found["state"].items():
        for key, value in state.items():
            np.testing.assert_array_equal(
                value, wanted["state"][name][key], err_msg=f"{name} {key}"
            )


def both_phases(
    cell: Cell, stock: RankPool, directory: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first phase's checkpoint, as arguments of the second, and what was saved."""
    here = str(directory / "phase 1")
    saved = stock.run(
        "tests.support.mapped_stock:phase_1",
        cell.worlds[0],
        layout=cell.before,
        hyper=FIRST,
        steps=STEPS,
        directory=here,
    )[0]
    return {"layout": cell.after, "hyper": FIRST, "directory": here, "policy": cell.policy}, saved


@pytest.mark.ranks
@pytest.mark.parametrize("name", of_every_version(CELLS, EVERY_VERSION))
def test_the_state_is_where_it_belongs(
    name: str, stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    cell = CELLS[name]
    arguments, saved = both_phases(cell, stock, tmp_path)
    after: dict[str, Any] = {"layout": cell.after, "hyper": FIRST}
    initial = stock.run("tests.support.mapped_stock:fresh", cell.worlds[1], **after)[0]
    wanted = expected(cell, saved, initial)
    found = ext.run(
        "tests.support.mapped_cases:resumed",
        cell.worlds[1],
        **arguments,
        more=MORE,
    )[0]
    assert "error" not in found, found["error"]["message"]
    assert_same(found["loaded"], wanted)
    for optimizer in found["report"]["optimizers"]:
        loaded = optimizer["loaded"]
        alone = not cell.after.distributed and cell.after.dtype == "fp32"  # no master weights
        assert loaded["proven"] == (0 if alone else loaded["elements"].get("param", 0))
    final = stock.run(
        "tests.support.mapped_stock:trained",
        cell.worlds[1],
        **after,
        **wanted,
        steps=STEPS,
        more=MORE,
    )[0]
    assert_same(found["final"], final)
    assert found["losses"] == final["losses"]
    RAN.append(name)


@pytest.mark.ranks
def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 37
    assert len(RAN) == len(set(RAN)) == chosen(request, test_the_state_is_where_it_belongs)


@pytest.mark.ranks
def test_a_map_is_applied_once_and_the_result_is_an_ordinary_checkpoint(
    stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    cell = CELLS["deeper, 2 ranks, gated"]
    arguments, _ = both_phases(cell, stock, tmp_path)
    there = str(tmp_path / "phase 2")
    resumed = "tests.support.mapped_cases:resumed"
    first = ext.run(resumed, 2, **arguments, more=MORE, save_to=there)[0]
    assert any(line.startswith("megatron_ext: TRANSITION APPLIED") for line in first["lines"])
    again = ext.run(resumed, 2, **{**arguments, "directory": there}, more=MORE)[0]
    assert any(line.startswith("megatron_ext: CONTINUED") for line in again["lines"])
    assert_same(again["loaded"], first["final"])
    assert again["report"]["parameters"] == {"new": [], "copied": [], "left": []}
    by_stock = stock.run(
        "tests.support.mapped_stock:loaded", 1, layout=cell.after, hyper=FIRST, directory=there
    )[0]
    assert_same(by_stock, first["final"])


@pytest.mark.ranks
def test_the_log_and_the_report_name_what_is_new_copied_and_left(
    stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    untied = replace(CELLS["untied"], policy=policy(new=["output_layer.weight"]))
    arguments, _ = both_phases(untied, stock, tmp_path)
    found = ext.run("tests.support.mapped_cases:resumed", 1, **arguments, more=0)[0]
    new = {"name": "output_layer.weight", "elements": 1024, "weights": True, "moments": True}
    assert found["report"]["parameters"] == {"new": [new], "copied": [], "left": []}
    text = "\n".join(found["lines"])
    assert " > parameters new, weights as initialised: 1 (1024 elements): output_layer" in text
    # (1 - b1) / (1 - b1^5) / sqrt((1 - b2) / (1 - b2^5)) at 0.9, 0.95 and 4 steps
    assert "their first update is 0.52 lr" in text
    rule = {"match": "output_layer.weight", "exp_avg_sq": "fill 1e-4"}
    with_rule = {**json.loads(untied.policy), "moments": [rule]}
    filled = {**arguments, "policy": json.dumps(with_rule)}
    found = ext.run("tests.support.mapped_cases:resumed", 1, **filled, more=0)[0]
    assert "first update" not in "\n".join(found["lines"])
    state = found["loaded"]["state"]["output_layer.weight"]
    assert (state["exp_avg_sq"] == np.float32(1e-4)).all()
    assert not state["exp_avg"].any()


@pytest.mark.ranks
def test_a_step_that_stock_did_not_store_is_the_iteration(
    stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    arguments, _ = both_phases(CELLS["a stage that trains nothing, by name"], stock, tmp_path)
    arguments = {**arguments, "more": 0}
    resumed = "tests.support.mapped_cases:resumed"
    unknown = ext.run(resumed, 2, **{**arguments, "policy": "{}"})[0]
    assert unknown["report"]["optimizers"][0]["step"]["value"] is None
    # sqrt(1 - 0.95) / (1 - 0.9)
    assert "the first update may be 2.24 times as large. Pass --selective-step N" in "\n".join(
        unknown["lines"]
    )
    known = ext.run(resumed, 2, **{**arguments, "policy": "{}"}, iteration=STEPS)[0]
    assert known["report"]["optimizers"][0]["step"]["value"] == STEPS
    assert f"step is set to the checkpoint's iteration, {STEPS}" in "\n".join(known["lines"])
    asked = ext.run(resumed, 2, **arguments, iteration=STEPS + 1)[0]
    assert asked["report"]["optimizers"][0]["step"]["value"] == STEPS
    assert "have no step" not in "\n".join(asked["lines"])


@pytest.mark.ranks
def test_state_that_is_left_behind_is_named(stock: RankPool, ext: RankPool, tmp_path: Path) -> None:
    arguments, saved = both_phases(CELLS["freeze one layer"], stock, tmp_path)
    found = ext.run("tests.support.mapped_cases:resumed", 1, **arguments, more=0)[0]
    left = {one["name"]: one["elements"] for one in found["report"]["parameters"]["left"]}
    assert left == {
        name: state["param"].size
        for name, state in saved["state"].items()
        if not name.startswith("decoder.layers.1.")
    }
    (line,) = [line for line in found["lines"] if "left behind, frozen" in line]
    assert f"{len(left)} ({sum(left.values())} elements): " in line


@pytest.mark.ranks
def test_a_checkpoint_without_names_is_converted_and_then_mapped(
    stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    """The way out that the refusals name."""
    cell = CELLS["thaw, 2 ranks"]
    buckets = replace(cell, before=replace(cell.before, format="dp_reshardable"))
    arguments, saved = both_phases(buckets, stock, tmp_path)
    arguments["directory"] = str(tmp_path / "converted")
    convert(tmp_path / "phase 1", tmp_path / "converted", to="fully_reshardable")
    found = ext.run("tests.support.mapped_cases:resumed", 2, **arguments, more=MORE)[0]
    after = {"layout": cell.after, "hyper": FIRST}
    wanted = expected(cell, saved, stock.run("tests.support.mapped_stock:fresh", 2, **after)[0])
    assert_same(found["loaded"], wanted)


#: Layouts, policy, and what the error of every rank has to say.
REFUSED = {
    "thawed": (CELLS["thaw"], "{}", ["mlp.linear_fc1.bias (moments only are missing)", "--sel"]),
    "added": (CELLS["mtp added"], "{}", ["mtp.layers.0.", "--selective-new-parameters PATTERN"]),
    "removed": (CELLS["mtp removed"], "{}", ["in the checkpoint only: mtp.layers.0.", "drop"]),
    "untied": (CELLS["untied"], "{}", ["output_layer.weight (weights and moments are missing)"]),
    "deeper": (CELLS["deeper"], "{}", ["decoder.layers.2.mlp.linear_fc1.bias (weights and"]),
    "nothing new": (
        CELLS["freeze"],
        policy(new=["mtp.*"]),
        ["--selective-new-parameters mtp.*: the checkpoint"],
    ),
    "no source": (
        CELLS["untied"],
        policy(copies=[{"to": "output_layer.weight", "from": "head.weight"}]),
        ["the checkpoint has no weights of head.weight, which output_layer.weight"],
    ),
    "another shape": (
        CELLS["untied"],
        policy(copies=[{"to": "output_layer.weight", "from": "decoder.final_layernorm.weight"}]),
        ["has shape (16,) in the checkpoint, output_layer.weight (64, 16) in the model"],
    ),
    "two sources": (
        CELLS["untied"],
        policy(
            copies=[
                {"to": "output_layer.weight", "from": "embedding.word_embeddings.weight"},
                {"to": "*_layer.weight", "from": "embedding.position_embeddings.weight"},
            ]
        ),
        ["output_layer.weight has two sources for its weights"],
    ),
    "a rule that overwrites it": (
        CELLS["untied"],
        json.dumps(
            {
                **json.loads(UNTIE),
                "moments": [{"match": "output*", "exp_avg": "reset", "exp_avg_sq": "reset"}],
            }
        ),
        ["overwrites both of them"],
    ),
    "no names": (
        Cell(
            replace(FULL, format="dp_reshardable"), replace(FULL, format="dp_reshardable"), "", same
        ),
        ALL,
        ["does not name parameters", "--dist-ckpt-optim-fully-reshardable"],
    ),
    "no names, legacy": (
        Cell(replace(FULL, format="torch"), replace(FULL, format="torch"), "", same),
        ALL,
        ["does not name parameters"],
    ),
}
REFUSALS: list[str] = []


@pytest.mark.ranks
@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_refuses_before_anything_is_changed(
    name: str, stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    cell, text, says = REFUSED[name]
    arguments, _ = both_phases(replace(cell, worlds=(1, 2)), stock, tmp_path)
    arguments["policies"] = [text]
    del arguments["policy"]
    found = ext.run("tests.support.policies:refused", 2, **arguments)
    for (of_rank,) in found:
        assert of_rank["type"] in ("CheckpointError", "PlanError", "PolicyError"), of_rank
        assert all(word in of_rank["message"] for word in says), of_rank["message"]
        assert of_rank["unchanged"]
        assert of_rank["in step"]
    REFUSALS.append(name)


@pytest.mark.ranks
def test_every_refusal_ran(request: pytest.FixtureRequest) -> None:
    assert len(REFUSED) == 12
    test = test_every_rank_refuses_before_anything_is_changed
    assert len(REFUSALS) == len(set(REFUSALS)) == chosen(request, test)
