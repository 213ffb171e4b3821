"""Phases of every kind of optimizer against stock's, whose state is corrected by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.host.optimizers import TABLE
from tests.conftest import FIRST, Checkpoints
from tests.support.harness import Hyper, Layout
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

PLAIN = Layout(distributed=False)
SECOND = Hyper(lr=1e-3, min_lr=1e-4)
#: Case -> layout and the classes of its chain. Megatron leaves vectors and embeddings to the last.
CASES = {
    "sgd": (replace(PLAIN, optimizer="sgd"), ["SGD"]),
    "sgd, fp32": (replace(PLAIN, optimizer="sgd", dtype="fp32"), ["SGD"]),
    "sgd, legacy": (replace(PLAIN, optimizer="sgd", format="torch"), ["SGD"]),
    "lion": (replace(PLAIN, optimizer="lion"), ["Lion", "FusedAdamStandIn"]),
    "lion, distributed": (Layout(optimizer="lion"), ["Lion"]),
    "lion, fully_reshardable": (Layout(optimizer="lion", format="fully_reshardable"), ["Lion"]),
    "lion, distributed, legacy": (Layout(optimizer="lion", format="torch"), ["Lion"]),
    "muon": (replace(PLAIN, optimizer="muon"), ["TensorParallelMuon", "FusedAdamStandIn"]),
    "muon, legacy": (
        replace(PLAIN, optimizer="muon", format="torch"),
        ["TensorParallelMuon", "FusedAdamStandIn"],
    ),
    "muon and lion": (
        replace(PLAIN, optimizer="muon", scalar="lion"),
        ["TensorParallelMuon", "Lion"],
    ),
    "muon, layer-wise": (
        replace(PLAIN, optimizer="muon", layer_wise=True),
        ["TensorParallelMuon", "FusedAdamStandIn"],
    ),
    # Stock cannot save SOAP's factors in torch_dist: their shapes are not the parameter's.
    "soap": (replace(PLAIN, optimizer="soap", format="torch"), ["SOAP", "FusedAdamStandIn"]),
    # Their names are in Megatron's registry, and not among the choices of --optimizer. The others
    # of the registry it cannot build: it gives them betas, which they do not take.
    "laprop": (replace(PLAIN, optimizer="laprop", format="torch"), ["LaProp", "FusedAdamStandIn"]),
    "rekls": (replace(PLAIN, optimizer="rekls", format="torch"), ["REKLS", "FusedAdamStandIn"]),
}
POLICIES = {
    "keep": "{}",
    "reset": "preset: reset",
    "scale": "moments: [{match: '*', exp_avg: scale 0.5}]",
    "prune": "moments: [{match: '*', exp_avg: prune 0.5}]",
    "gradient-scale": "preset: {name: gradient-scale, s: 2, decline: [clip_grad]}",
}
#: What has no meaning: a threshold in SOAP's basis, and a gradient that its factors have not seen.
REFUSED = {
    *(("soap", "prune"), ("soap", "gradient-scale")),
    *(("rekls", "prune"), ("rekls", "gradient-scale"), ("laprop", "gradient-scale")),
}
#: A quantile of a parameter that two ranks hold: the hand has only its own part.
APART = {(case, 2) for case in CASES if case.startswith("lion, ")}
#: On two ranks stock gathers whole parameters of different sizes, which gloo cannot. With the
#: layout of the training loop it need not: tests/hooks/test_layer_wise.py.
ON = [
    (case, world)
    for case in CASES
    for world in (1, 2)
    if (case, world) not in {("muon, layer-wise", 2), ("laprop", 1), ("rekls", 1)}
]


def cells(case: str, world: int) -> list[str]:
    """The policies of a case."""
    return [
        name
        for name in POLICIES
        if (case, name) not in REFUSED and not (name == "prune" and (case, world) in APART)
    ]


def test_no_cell_is_left_out() -> None:
    assert len(ON) == 25
    everything = len(ON) * len(POLICIES)
    left_out = 2 * 2 + 3 + len(APART)
    assert sum(len(cells(*one)) for one in ON) == everything - left_out == 115


@pytest.mark.parametrize(("case", "world"), ON)
def test_the_next_steps_are_stocks_with_the_state_corrected_by_hand(
    case: str, world: int, stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    layout, classes = CASES[case]
    asked = cells(case, world)
    # L2 decay is not scaled with the gradient, and SGD knows no other.
    decay = 0.0 if classes == ["SGD"] else 0.1
    hyper: dict[str, Any] = {
        "first": replace(FIRST, weight_decay=decay, clip_grad=0.0),
        "second": replace(SECOND, weight_decay=decay, clip_grad=0.0),
    }
    where = {"layout": layout, "directory": str(tmp_path / "phase1")}
    expected = stock.run(
        "tests.support.optimizer_stock:expected", world, changes=asked, **hyper, **where
    )
    found = ext.run(
        "tests.support.optimizer_ours:resumed",
        world,
        second=hyper["second"],
        asked={name: POLICIES[name] for name in asked},
        **where,
    )
    checked = 0
    for ours, stocks in zip(found, expected, strict=True):
        saved = stocks["saved"]
        assert list(dict.fromkeys(one["class"] for one in saved)) == classes
        for name in asked:
            for when in ("loaded", "final"):
                _same(ours[name][when], stocks[name][when], f"{name}, {when}")
            assert ours[name]["losses"] == stocks[name]["losses"]
            assert ours[name]["checked"] == [True] * len(classes), name
            for part in ours[name]["report"]["optimizers"]:
                _proven(part, layout)
                if name == "reset":
                    _unread(part, layout)
            assert (name != "keep") == any(_differ(saved, stocks[name]["loaded"])), name
            checked += 1
    assert checked == len(asked) * world


def _proven(part: dict[str, Any], layout: Layout) -> None:
    """Master weights are the model's; in fp32 there are none."""
    assert part["loaded"]["elements"]["param"] > 0
    masters = part["loaded"]["elements"]["param"] if layout.dtype == "bf16" else 0
    assert part["loaded"]["proven"] == masters


def _unread(part: dict[str, Any], layout: Layout) -> None:
    """What is reset need not be read, where the format has an entry for it."""
    for state in part["moments"]["state"].values():
        assert (state["rms_before"] is None) == (layout.format != "torch")
        assert (state["unread"] > 0) == (layout.format != "torch")
        assert state["rms_after"] == 0.0


def _same(ours: list[dict[str, Any]], stocks: list[dict[str, Any]], what: str) -> None:
    assert len(ours) == len(stocks) > 0
    for mine, theirs in zip(ours, stocks, strict=True):
        assert mine.keys() == theirs.keys(), what
        for key, value in theirs.items():
            np.testing.assert_array_equal(mine[key], value, err_msg=f"{what}, {key}")


def _differ(saved: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> Iterator[bool]:
    for before, after in zip(saved, loaded, strict=True):
        yield any(not np.array_equal(before[key], after[key]) for key in before)


#: Case -> the chain, a policy, and what the error says.
HAS = "Narrow the rule, for example with optimizer=adam"
WRONG_RULES = {
    "a second moment of Lion": (
        "lion",
        "moments: [{match: '*', exp_avg_sq: reset}]",
        ["which Lion updates", "it has no exp_avg_sq", "Lion: exp_avg (first moment)", HAS],
    ),
    "a second moment of Muon": (
        "muon",
        "moments: [{match: '*linear_fc1.weight', exp_avg_sq: scale 4}]",
        ["which Muon updates", "Muon: momentum_buffer (first moment)", HAS],
    ),
    "a second moment of SGD": (
        "sgd",
        "moments: [{match: '*', exp_avg_sq: floor 1e-8}]",
        ["which SGD updates", "SGD: momentum_buffer (first moment)", HAS],
    ),
    "a bias correction of Muon": (
        "muon",
        "moments: [{match: '*', exp_avg: bias-consistent}]",
        ["which Muon updates", "'bias-consistent' is for moments with a bias correction", HAS],
    ),
    "a quantile in SOAP's basis": (
        "soap",
        "moments: [{match: '*', exp_avg: prune 0.5}]",
        ["which SOAP updates", "in a basis of their own", "only 'reset' and 'scale'", HAS],
    ),
    "rows in SOAP's basis": (
        "soap",
        "moments: [{match: '*linear_fc1.weight[0:3]', exp_avg: reset}]",
        ["which SOAP updates", "in a basis of their own"],
    ),
    "a scaled gradient of SOAP": (
        "soap",
        "preset: gradient-scale 2",
        ["preset gradient-scale 2", "L, R, Q_L, Q_R would have to follow", "Take another preset"],
    ),
    "a quantile in SOAP's basis by a preset": (
        "soap",
        "preset: relora 0.5",
        ["preset relora 0.5", "the moments of SOAP are in a basis of their own"],
    ),
    "a scaled gradient with SGD's decay": (
        "sgd",
        "preset: gradient-scale 2",
        ["weight decay is coupled (L2 in the gradient", "the update of SGD"],
    ),
}


def assert_refused(
    ext: RankPool, layout: Layout, directory: str, policy: str, error: str, words: list[str]
) -> None:
    """On both ranks, at the same time, before anything is changed."""
    for (result,) in ext.run(
        "tests.support.policies:refused",
        2,
        layout=layout,
        hyper=FIRST,
        directory=directory,
        policies=[policy],
    ):
        assert result["type"] == error
        assert result["in step"]
        assert result["unchanged"]
        for word in words:
            assert word in result["message"]


@pytest.mark.parametrize("name", WRONG_RULES)
def test_a_rule_without_a_meaning_is_refused_before_anything_is_changed(
    name: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    case, policy, words = WRONG_RULES[name]
    layout = CASES[case][0]
    directory, _ = checkpoints.phase_1(layout, 2)
    assert_refused(ext, layout, directory, policy, "PlanError", words)


@pytest.mark.parametrize("format", ["dp_reshardable", "torch"])
def test_sgd_without_momentum_has_nothing_to_keep(
    format: str, stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    layout = replace(PLAIN, optimizer="sgd", momentum=0.0, format=format)
    where = {"layout": layout, "directory": str(tmp_path / "phase1")}
    expected = stock.run(
        "tests.support.optimizer_stock:expected",
        2,
        first=FIRST,
        second=SECOND,
        changes=["keep"],
        **where,
    )
    asked = {name: POLICIES[name] for name in ("keep", "reset")}
    found = ext.run("tests.support.optimizer_ours:resumed", 2, second=SECOND, asked=asked, **where)
    for ours, stocks in zip(found, expected, strict=True):
        for name in asked:
            _same(ours[name]["final"], stocks["keep"]["final"], name)
            (part,) = ours[name]["report"]["optimizers"]
            assert set(part["loaded"]["elements"]) == {"param"}
            assert part["moments"] is None
            _proven(part, layout)


TAMPERED = {
    "sgd": "an update by SGD",
    "lion": "an update by Lion",
    "muon": "an update by Muon",
    "soap": "an update by SOAP",
}


@pytest.mark.parametrize("case", TAMPERED)
def test_the_guard_sees_moments_that_are_no_result_of_the_update(
    case: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    layout = CASES[case][0]
    directory, _ = checkpoints.phase_1(layout, 2)
    for kind, message in ext.run(
        "tests.support.optimizer_ours:tampered", 2, layout=layout, hyper=FIRST, directory=directory
    ):
        assert kind == "GuardError"
        assert TAMPERED[case] in message


@pytest.mark.parametrize("case", ["sgd", "lion, distributed", "muon and lion", "soap"])
def test_a_running_optimizer_is_changed_in_the_same_way(
    case: str, stock: RankPool, ext: RankPool, tmp_path: Path
) -> None:
    layout = CASES[case][0]
    where = {"layout": layout, "directory": str(tmp_path / "phase1")}
    expected = stock.run(
        "tests.support.optimizer_stock:expected",
        2,
        first=FIRST,
        second=FIRST,
        changes=["scale"],
        **where,
    )
    found = ext.run(
        "tests.support.optimizer_ours:transformed",
        2,
        hyper=FIRST,
        policy=POLICIES["scale"],
        **where,
    )
    for ours, stocks in zip(found, expected, strict=True):
        _same(ours, stocks["scale"]["loaded"], "transformed")
        assert any(_differ(stocks["saved"], ours))


def test_an_optimizer_of_the_scripts_own_is_refused_with_what_is_known(ext: RankPool) -> None:
    layout = replace(PLAIN, optimizer="unknown")
    results = ext.run("tests.support.optimizer_ours:unknown", 2, layout=layout, hyper=FIRST)
    for kind, message in results:
        assert kind == "HostError"
        assert "the state of Unknown is not known" in message
        for row in TABLE:
            assert str(row) in message


#: What was saved -> what is to go on, and whose state the error names.
LEGACY = replace(PLAIN, format="torch")
SWITCHED = {
    "adam to sgd": (LEGACY, replace(LEGACY, optimizer="sgd"), "Adam: exp_avg", "SGD: momentum"),
    "sgd to adam": (replace(LEGACY, optimizer="sgd"), LEGACY, "SGD: momentum", "Adam: exp_avg"),
    "adam to lion": (Layout(), Layout(optimizer="lion"), "Adam: exp_avg", "Lion: exp_avg"),
    "lion to adam": (
        Layout(optimizer="lion", format="torch"),
        Layout(format="torch"),
        "Lion: exp_avg",
        "Adam: exp_avg",
    ),
    "muon's adam to lion": (
        replace(PLAIN, optimizer="muon"),
        replace(PLAIN, optimizer="muon", scalar="lion"),
        "Adam: exp_avg",
        "Lion: exp_avg",
    ),
    "soap to muon": (
        replace(LEGACY, optimizer="soap"),
        replace(LEGACY, optimizer="muon"),
        "SOAP: exp_avg",
        "Muon: momentum",
    ),
}


@pytest.mark.parametrize("name", SWITCHED)
def test_the_state_of_another_optimizer_is_refused_before_anything_is_changed(
    name: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    before, now, saved, expected = SWITCHED[name]
    directory, _ = checkpoints.phase_1(before, 2)
    words = [
        "is not that of this optimizer",
        f"those of {saved}",
        f"expected those of {expected}",
    ]
    assert_refused(ext, now, directory, "{}", "CheckpointError", words)
