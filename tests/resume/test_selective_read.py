"""What a policy overwrites is not read, and no memory is left as it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.plan.matching import overwritten
from megatron_ext.plan.parameters import Parameter
from megatron_ext.policy.match import Match, MomentRule
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import Preset
from megatron_ext.rules.registry import parse
from tests.conftest import FIRST, Checkpoints
from tests.support.cells import chosen, with_all
from tests.support.harness import Hyper, Layout
from tests.support.pool import RankPool

SECOND = Hyper(lr=1e-3, min_lr=1e-4, train_iters=60)

#: Buckets without padding, so that the ratios are exact.
BF16 = Layout(hidden=128)
FULLY = replace(BF16, format="fully_reshardable")
SMALL = Layout(hidden=20, layers=4)

#: Name -> layout, ranks, bytes of weights and master weights a parameter.
LAYOUTS: dict[str, tuple[Layout, int, tuple[int, int]]] = {
    "dp_reshardable": (BF16, 1, (2, 4)),
    "dp_reshardable, fully parallel": (replace(BF16, parallel_load=True), 2, (2, 4)),
    "fully_reshardable": (FULLY, 1, (2, 4)),
    "fully_reshardable, fully parallel": (replace(FULLY, parallel_load=True), 2, (2, 4)),
    "fp32, dp_reshardable": (replace(BF16, dtype="fp32"), 1, (4, 4)),
    "fp32, fully_reshardable": (replace(FULLY, dtype="fp32"), 1, (4, 4)),
    "bf16, not distributed": (replace(BF16, distributed=False), 1, (2, 4)),
}
#: Stock writes into a view of a leaf there (distrib_optimizer.py:1225, 0.19.2).
NOT_BY_STOCK = {"fp32, dp_reshardable"}
ALL = "moments: [{match: '*', exp_avg: %s, exp_avg_sq: %s}]"
#: Name -> policy, and which moments are not read.
POLICIES = {
    "reset": ("preset: reset", ("exp_avg", "exp_avg_sq")),
    "reset v": (ALL % ("keep", "reset"), ("exp_avg_sq",)),
    "fill m": (ALL % ("fill 0.25", "keep"), ("exp_avg",)),
}

CELLS = [(layout, policy) for layout in LAYOUTS for policy in POLICIES]
#: Every layout and every policy; the other cells are run with --all.
CHOSEN = {
    ("dp_reshardable", "reset"),
    ("dp_reshardable", "reset v"),
    ("dp_reshardable, fully parallel", "fill m"),
    ("fully_reshardable", "reset v"),
    ("fully_reshardable, fully parallel", "reset"),
    ("fp32, dp_reshardable", "fill m"),
    ("fp32, fully_reshardable", "reset"),
    ("bf16, not distributed", "reset v"),
}

_executed: list[tuple[str, str]] = []


@pytest.mark.ranks
@pytest.mark.parametrize(("layout", "policy"), with_all(CELLS, CHOSEN))
def test_what_is_overwritten_is_not_read(
    layout: str, policy: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    where, world, (weights, master) = LAYOUTS[layout]
    text, unread = POLICIES[policy]
    directory, _ = checkpoints.phase_1(where, world)
    call: dict[str, Any] = {"layout": where, "hyper": SECOND, "directory": directory}
    # The arguments of phase 1: with others stock does not load at all.
    unchanged = {**call, "hyper": FIRST, "policy": "{}" if layout in NOT_BY_STOCK else None}
    stock = ext.run("tests.support.reading:resumed", world, **unchanged)[0]
    found = ext.run("tests.support.reading:resumed", world, policy=text, **call)[0]
    all_bytes = weights + master + 8
    assert found["payload"] * all_bytes == stock["payload"] * (all_bytes - 4 * len(unread))
    assert found["metadata"] == 1
    if layout not in NOT_BY_STOCK:
        assert stock["metadata"] > 1
    (report,) = found["report"]["optimizers"]
    elements = sum(t["param"].size for t in stock["state"].values())
    for key in ("exp_avg", "exp_avg_sq"):
        state = report["moments"]["state"][key]
        # A replica counts on each rank that has it; here there is none.
        assert state["unread"] == (elements if key in unread else 0)
        assert (state["rms_before"] is None) == (key in unread)
        assert report["loaded"]["elements"][key] == (0 if key in unread else elements)
        assert (report["loaded"]["tensors"][key] == 0) == (key in unread)
        for name, tensors in found["state"].items():
            wanted = stock["state"][name][key]
            if key in unread:
                wanted = np.full_like(wanted, 0.25 if policy == "fill m" else 0.0)
            np.testing.assert_array_equal(tensors[key], wanted, err_msg=name)
            np.testing.assert_array_equal(tensors["param"], stock["state"][name]["param"])
    assert sum("without being read" in line for line in found["lines"]) == len(unread)
    _executed.append((layout, policy))


@pytest.mark.ranks
def test_so_many_cells_ran(request: pytest.FixtureRequest) -> None:
    if not _executed:
        pytest.skip("the matrix was deselected")
    ran = chosen(request, test_what_is_overwritten_is_not_read)
    assert len(set(_executed)) == len(_executed) == ran
    assert {layout for layout, _ in CHOSEN} == set(LAYOUTS)
    assert {policy for _, policy in CHOSEN} == set(POLICIES)


@pytest.mark.ranks
def test_padding_between_parameters_is_not_read_either(
    ext: RankPool, checkpoints: Checkpoints
) -> None:
    directory, _ = checkpoints.phase_1(SMALL, 1)
    call: dict[str, Any] = {"layout": SMALL, "hyper": SECOND, "directory": directory}
    stock, found = (
        ext.run("tests.support.reading:resumed", 1, policy=policy, **call)[0]
        for policy in ("{}", "preset: reset")
    )
    elements = sum(t["param"].size for t in stock["state"].values())
    assert stock["payload"] > 14 * elements
    # bf16 weights have no padding; master weights and each of the moments have the same.
    assert 3 * (found["payload"] - 2 * elements) == stock["payload"] - 2 * elements


LAYER = "moments: [{match: 'decoder.layers.2.*', exp_avg: reset, exp_avg_sq: reset}]"
ROWS = "moments: [{match: '*.linear_fc1.weight[:8]', exp_avg: reset, exp_avg_sq: reset}]"


def _layer(name: str) -> bool:
    return name.startswith("decoder.layers.2.")


def _none(name: str) -> bool:
    return False


#: Layout and ranks.
SPREAD = {
    "buckets, one rank": (SMALL, 1),
    "buckets": (SMALL, 2),
    "model space, one rank": (replace(SMALL, format="fully_reshardable"), 1),
    "model space": (replace(SMALL, format="fully_reshardable"), 2),
    "tp 2, pp 2": (replace(SMALL, format="fully_reshardable", tp=2, pp=2), 4),
    "fully parallel, pp 2": (
        replace(SMALL, format="fully_reshardable", parallel_load=True, pp=2),
        4,
    ),
    "many buckets": (replace(SMALL, overlap=True), 2),
    "not distributed": (replace(SMALL, distributed=False, tp=2), 2),
    "experts": (replace(SMALL, experts=4, ep=2), 2),
}
#: One of each kind; the others are run with --all.
SOME = {"model space, one rank", "fully parallel, pp 2", "many buckets", "not distributed"}


@pytest.mark.ranks
@pytest.mark.parametrize("name", with_all(SPREAD, SOME))
def test_only_parameters_that_are_overwritten_as_a_whole_are_left_out(
    name: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    """One layer is a part of a tensor that all layers are stored in, on one pipeline stage."""
    layout, world = SPREAD[name]
    directory, _ = checkpoints.phase_1(layout, world)
    call: dict[str, Any] = {"layout": layout, "hyper": SECOND, "directory": directory}
    # The arguments of phase 1: with others stock does not load at all.
    unchanged = {**call, "hyper": FIRST, "policy": None}
    stock = ext.run("tests.support.reading:resumed", world, **unchanged)[0]
    for policy, as_a_whole in ((LAYER, _layer), (ROWS, _none)):
        found = ext.run("tests.support.reading:resumed", world, policy=policy, **call)[0]
        left_out = sum(t["param"].size for n, t in stock["state"].items() if as_a_whole(n))
        if world == 1:
            left_out = 0  # a part of a stored tensor: not on one rank
        assert (found["payload"] < stock["payload"]) == (left_out > 0)
        unread = [o["moments"]["state"]["exp_avg"]["unread"] for o in found["report"]["optimizers"]]
        assert (sum(unread) >= left_out) if left_out else (sum(unread) == 0)
        for parameter, tensors in found["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                wanted = stock["state"][parameter][key].copy()
                if as_a_whole(parameter):
                    wanted[:] = 0
                elif policy == ROWS and parameter.endswith(".linear_fc1.weight"):
                    wanted[:8] = 0
                np.testing.assert_array_equal(tensors[key], wanted, err_msg=parameter)


@pytest.mark.ranks
def test_a_phase_that_goes_on_reads_everything(
    ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    directory, _ = checkpoints.phase_1(BF16, 1)
    call: dict[str, Any] = {"layout": BF16, "hyper": SECOND, "policy": "preset: reset"}
    second = str(tmp_path / "second")
    first = ext.run(
        "tests.support.reading:resumed", 1, directory=directory, save_to=second, **call
    )[0]
    again = ext.run("tests.support.reading:resumed", 1, directory=second, **call)[0]
    assert first["report"]["phase"]["state"] == "applied"
    assert again["report"]["phase"]["state"] == "continued"
    assert first["payload"] * 14 == again["payload"] * 6


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", [False, True])
def test_a_rank_without_parameters_overwrites_as_the_others_do(
    parallel: bool, ext: RankPool, checkpoints: Checkpoints
) -> None:
    """With so few trained elements all of the second rank's share of the buffer is padding.

    Stock cannot save that as dp_reshardable: "empty bucket encountered".
    """
    layout = replace(FULLY, hidden=16, parallel_load=parallel, trained="final_layernorm.weight")
    directory, _ = checkpoints.phase_1(layout, 2)
    call: dict[str, Any] = {"layout": layout, "hyper": SECOND, "directory": directory}
    policies = {
        "kept": "{}",
        "reset": "preset: reset",
        "momentum": "preset: reset-momentum",
        "filled": ALL % ("fill 0.25", "keep"),
    }
    found = ext.run("tests.support.policies:resumed", 2, policies=policies, **call)
    assert found[0]["kept"]["held"]
    assert not found[1]["kept"]["held"]
    kept = found[0]["kept"]["state"]
    wanted = {"reset": (0.0, 0.0), "momentum": (0.0, None), "filled": (0.25, None)}
    for policy, values in wanted.items():
        for name, tensors in found[0][policy]["state"].items():
            for key, value in zip(("exp_avg", "exp_avg_sq"), values, strict=True):
                old = kept[name][key]
                expected = old if value is None else np.full_like(old, value)
                np.testing.assert_array_equal(tensors[key], expected, err_msg=f"{policy} {name}")


@pytest.mark.ranks
def test_everything_is_read_where_stock_would_miss_keys(ext: RankPool) -> None:
    """What is not asked for counts as missing there. Not by a load: with torch 2.15 those fail."""
    found = ext.run("tests.support.reading:strictness", 1)[0]
    assert found == {
        None: False,
        "assume_ok_unexpected": False,
        "log_unexpected": False,
        "raise_unexpected": False,
        "return_unexpected": False,
        "log_all": True,
        "raise_all": True,
        "return_all": True,
        "ignore_all": True,
    }


@pytest.mark.ranks
@pytest.mark.parametrize("policy", ["{}", "preset: gradient-scale 0.5"])
def test_a_moment_that_was_not_read_and_is_kept_is_refused(
    policy: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    directory, _ = checkpoints.phase_1(BF16, 1)
    error = ext.run(
        "tests.support.reading:planned_otherwise",
        1,
        layout=BF16,
        hyper=SECOND,
        directory=directory,
        policy=policy,
    )[0]
    assert error.startswith("CheckpointError: ")
    assert "exp_avg of decoder.layers.0.mlp.linear_fc1.weight was not read" in error


OPERATIONS = ["keep", "reset", "fill 0.5", "fill mean", "scale 2", "prune-random 0.5"]
NAMES = st.sampled_from(["*", "a.*", "*.weight", "a.weight", "a.weight[:4]", "a.weight[4:]"])


@given(
    rules=st.lists(st.tuples(NAMES, *[st.sampled_from(OPERATIONS)] * 2), max_size=2),
    reset=st.booleans(),
)
def test_what_counts_as_overwritten(rules: list[tuple[str, str, str]], reset: bool) -> None:
    """By a count of its own: for each row the rules that match it, or the preset."""
    policy = ResumePolicy(
        preset=Preset("reset" if reset else "keep"),
        rules=tuple(MomentRule(Match.parse(n), parse(m), parse(v)) for n, m, v in rules),
    )
    found = overwritten(policy, Parameter("a.weight", (8, 3), 0), {})
    blind = {"reset", "fill 0.5"}
    wanted = set()
    for which, key in ((1, "exp_avg"), (2, "exp_avg_sq")):
        done = []
        for row in range(8):
            spans = {"a.weight[:4]": range(4), "a.weight[4:]": range(4, 8)}
            fits = [r for r in rules if row in spans.get(r[0], range(8))]
            done.append([r[which] for r in fits] or ["reset" if reset else "keep"])
        if all(len(d) == 1 and d[0] in blind for d in done):
            wanted.add(key)
    contradiction = any(
        len([r for r in rules if row in spans.get(r[0], range(8))]) > 1 for row in range(8)
    )
    assert found == (frozenset() if contradiction else frozenset(wanted))


def test_a_rule_for_a_group_counts_only_where_the_group_is_known() -> None:
    rule = MomentRule(Match.parse("* wd_mult=1.0"), parse("reset"), parse("reset"))
    policy, parameter = ResumePolicy(rules=(rule,)), Parameter("a.weight", (8, 3), 0)
    assert overwritten(policy, parameter, {"wd_mult": 1.0}) == {"exp_avg", "exp_avg_sq"}
    assert overwritten(policy, parameter, {"wd_mult": 0.0}) == frozenset()
    assert overwritten(policy, parameter, None) == frozenset()
    kept = MomentRule(Match.parse("* wd_mult=1.0"))
    policy = ResumePolicy(preset=Preset("reset"), rules=(kept,))
    assert overwritten(policy, parameter, {"wd_mult": 0.0}) == {"exp_avg", "exp_avg_sq"}
    assert overwritten(policy, parameter, None) == frozenset()
