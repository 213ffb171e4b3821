"""`fill mean-of` on real ranks: one mean of several parameters, the same bits on every layout."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.conftest import FIRST, Checkpoints
from tests.support.cells import chosen, of_every_version
from tests.support.harness import Layout
from tests.support.pool import RankPool
from tests.support.unsharded import State

BEFORE = Layout(format="fully_reshardable", layers=4)
AFTER = replace(BEFORE, qk_norm=True)
#: Layers that no optimizer updates have no moments.
THAWED = r"^(?!.*layers[.]2[.])"

#: Parameters of different size: tensor parallelism cuts the matrices and copies the norms.
SOURCES = r"decoder[.]layers[.]\d[.].*(linear_fc1[.](weight|bias)|input_layernorm[.]weight)"
NEW = "*[qk]_layernorm.*"
FIRST_LAYER = "decoder.layers.0.mlp.linear_fc1.weight"

#: Parameters, moment, the pattern of the sources, and the rows that are filled.
FILLED = (
    (r".*[.]q_layernorm[.](weight|bias)", "exp_avg", SOURCES, 0),
    (r".*[.]q_layernorm[.](weight|bias)", "exp_avg_sq", SOURCES, 0),
    (r".*[.]k_layernorm[.]weight", "exp_avg_sq", r".*[.]pre_mlp_layernorm[.]weight", 0),
    # Nothing of it is read from the checkpoint.
    (r"decoder[.]final_layernorm[.]bias", "exp_avg", r"embedding[.].*", 0),
    (r"decoder[.]final_layernorm[.]bias", "exp_avg_sq", r"output_layer[.].*", 0),
    (r"embedding[.]position_embeddings[.]weight", "exp_avg_sq", SOURCES, 5),
)


def moments() -> list[dict[str, str]]:
    """The rules of `FILLED`, and one that scales some rows of a source."""
    by_match: dict[str, dict[str, str]] = {}
    for name, key, sources, first in FILLED:
        match = f"re:{name}" + (f"[{first}:]" if first else "")
        by_match.setdefault(match, {})[key] = f"fill mean-of re:{sources}"
    rules = [{"match": match, **keys} for match, keys in by_match.items()]
    return [*rules, {"match": f"{FIRST_LAYER}[2:7]", "exp_avg": "scale 4", "exp_avg_sq": "scale 0"}]


POLICY = json.dumps({"parameters": {"new": [NEW]}, "moments": moments()})


def expected(before: State, found: State) -> dict[tuple[str, str], np.ndarray]:
    """Every moment of what is trained after the resume, from the full tensors in float64."""
    old = {
        (name, key): state[key].astype(np.float64)
        for name, state in before.items()
        for key in ("exp_avg", "exp_avg_sq")
        if name in found
    }
    old[FIRST_LAYER, "exp_avg"][2:7] *= 4
    old[FIRST_LAYER, "exp_avg_sq"][2:7] = 0
    out = {
        (name, key): old.get((name, key), np.zeros(found[name][key].shape)).astype(np.float32)
        for name in found
        for key in ("exp_avg", "exp_avg_sq")
    }
    for pattern, key, sources, first in FILLED:
        matched = [x for (name, k), x in old.items() if k == key and re.fullmatch(sources, name)]
        mean = math.fsum(float(v) for x in matched for v in x.flat) / sum(x.size for x in matched)
        for name in (name for name in found if re.fullmatch(pattern, name)):
            out[name, key][first:] = np.float32(mean)
    return out


#: Layout and ranks of the resume; every checkpoint is the same.
CELLS = {
    "1 rank": (AFTER, 1),
    "dp 2": (AFTER, 2),
    "tp 2": (replace(AFTER, tp=2), 2),
    "pp 2": (replace(AFTER, pp=2), 2),
    "not distributed, one layer frozen": (replace(AFTER, distributed=False, trained=THAWED), 2),
}
RAN: dict[str, dict[tuple[str, str], np.ndarray]] = {}

Before = Callable[[Layout], tuple[str, State]]


@pytest.fixture(scope="module")
def before(stock: RankPool, checkpoints: Checkpoints) -> Before:
    """The checkpoint of a layout, and what stock loads of it."""

    def of(layout: Layout) -> tuple[str, State]:
        directory, _ = checkpoints.phase_1(layout, layout.ep)
        arguments = {"layout": layout, "hyper": FIRST, "directory": directory}
        state = stock.run("tests.support.policies_stock:state", layout.ep, **arguments)[0]
        return directory, state

    return of


@pytest.mark.ranks
@pytest.mark.parametrize("name", of_every_version(CELLS, ("pp 2",)))
def test_it_is_the_mean_in_float64_on_every_layout(
    name: str, before: Before, ext: RankPool
) -> None:
    layout, world = CELLS[name]
    directory, saved = before(BEFORE)
    found = ext.run(
        "tests.support.mapped_cases:resumed",
        world,
        layout=layout,
        hyper=FIRST,
        directory=directory,
        policy=POLICY,
        more=1,
    )[0]
    assert "error" not in found, found["error"]["message"]
    state = found["loaded"]["state"]
    wanted = expected(saved, state)
    for (parameter, key), value in wanted.items():
        np.testing.assert_array_equal(state[parameter][key], value, err_msg=f"{parameter} {key}")
    assert all(wanted["decoder.layers.1.self_attention.q_layernorm.bias", "exp_avg"] != 0)
    # Of k's biases, which no rule fills.
    (warning,) = [line for line in found["lines"] if "their first update is" in line]
    biases = sorted(n for n in state if n.endswith("k_layernorm.bias"))
    assert f"the moments of {len(biases)} new parameters ({biases[0]}" in warning
    assert "The remedy is --selective-rule PATTERN reset 'fill mean-of OTHERS'" in warning
    if layout.distributed:
        of_moments = found["report"]["optimizers"][0]["moments"]["state"]
        assert all(of_moments[key]["unread"] > 0 for key in ("exp_avg", "exp_avg_sq"))
    RAN[name] = wanted


@pytest.mark.ranks
def test_every_layout_ran_and_gave_the_same_bits(request: pytest.FixtureRequest) -> None:
    assert len(RAN) == chosen(request, test_it_is_the_mean_in_float64_on_every_layout)
    same = [RAN[name] for name in RAN if "frozen" not in name]
    for other in same[1:]:
        assert other.keys() == same[0].keys()
        assert all(np.array_equal(other[k], same[0][k]) for k in other)


#: Layouts before and after, rules, and what the error of every rank has to say.
REFUSED: dict[str, tuple[Layout, Layout, list[dict[str, str]], str]] = {
    "nothing matches": (
        BEFORE,
        replace(AFTER, pp=2),
        [{"match": "decoder.layers.0.*q_layernorm*", "exp_avg": "fill mean-of *.v_layernorm.*"}],
        "fill mean-of *.v_layernorm.* for exp_avg matches no parameter that holds moments",
    ),
    # The first stage fills, and the second one has the source.
    "another rule on another stage": (
        BEFORE,
        replace(AFTER, pp=2),
        [
            {"match": "decoder.layers.0.*q_layernorm*", "exp_avg": "fill mean-of *.linear_fc1.*"},
            {"match": "decoder.layers.3.mlp.linear_fc1.bias", "exp_avg": "reset"},
        ],
        "found decoder.layers.3.mlp.linear_fc1.bias (changed by another rule)",
    ),
    "a new one on another stage": (
        BEFORE,
        replace(AFTER, pp=2),
        [{"match": "decoder.layers.0.*q_layernorm*", "exp_avg": "fill mean-of *k_layernorm*"}],
        "self_attention.k_layernorm.bias (new to the optimizer), decoder.layers.0.self_attention.k",
    ),
    "another optimizer": (
        Layout(experts=4, ep=2),
        Layout(experts=4, ep=2),
        [{"match": "decoder.final_layernorm.*", "exp_avg": "fill mean-of *.experts.*linear_fc1.*"}],
        "another optimizer of the chain updates decoder.layers.0.mlp.experts.local_experts.0.",
    ),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_refuses_before_anything_is_changed(
    name: str, before: Before, ext: RankPool
) -> None:
    source, target, rules, says = REFUSED[name]
    policy: dict[str, Any] = {"moments": rules}
    if target.qk_norm:
        policy["parameters"] = {"new": [NEW]}
    found = ext.run(
        "tests.support.policies:refused",
        2,
        layout=target,
        hyper=FIRST,
        directory=before(source)[0],
        policies=[json.dumps(policy)],
    )
    for (of_rank,) in found:
        assert of_rank["type"] == "PlanError", of_rank
        assert says in of_rank["message"]
        assert of_rank["unchanged"]
        assert of_rank["in step"]


@pytest.mark.ranks
def test_a_live_optimizer_is_filled_too(before: Before, ext: RankPool) -> None:
    directory, saved = before(BEFORE)
    rules = [{"match": "decoder.final_layernorm.bias", "exp_avg_sq": f"fill mean-of re:{SOURCES}"}]
    found = ext.run(
        "tests.support.policies:transformed",
        2,
        layout=replace(BEFORE, tp=2),
        hyper=FIRST,
        directory=directory,
        policies={"mean": json.dumps({"moments": rules})},
        ours=True,
    )[0]["mean"]["state"]
    matched = [s["exp_avg_sq"].ravel() for n, s in saved.items() if re.fullmatch(SOURCES, n)]
    mean = np.float32(math.fsum(np.concatenate(matched)) / sum(map(len, matched)))
    assert (found["decoder.final_layernorm.bias"]["exp_avg_sq"] == mean).all()


@pytest.mark.ranks
def test_its_collectives_are_those_of_another_mean(before: Before, ext: RankPool) -> None:
    directory, _ = before(BEFORE)

    def collectives(fill: str) -> list[str]:
        # A load with a rule that overwrites has one more, so that it reads nothing in vain.
        rule = {"match": "output_layer.weight[32:]", "exp_avg": "reset", "exp_avg_sq": fill}
        policy = json.dumps({"moments": [rule]})
        arguments = {"layout": BEFORE, "hyper": FIRST, "directory": directory, "policy": policy}
        return ext.run("tests.support.policies:reductions", 2, **arguments)[0]

    assert collectives("fill mean-of decoder.final_layernorm.bias") == collectives("fill mean")
