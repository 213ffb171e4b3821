"""Phases on every format and layout: begun once, continued after that, with and without stock."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import FIRST, STEPS, Checkpoints
from tests.resume.test_policies import AT_RANDOM, ROWS, SECOND, rule
from tests.support.cells import chosen, of_every_version
from tests.support.harness import GLOBAL_BATCH, Layout
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

#: Everything that must not be done twice.
POLICIES = {
    "reset": "preset: reset",
    "reset momentum": "preset: reset-momentum",
    "bias consistent": "preset: bias-consistent",
    "gradient scale": "preset: gradient-scale 0.5",
    "batch size": "preset: {name: batch-size, old: 8, new: 16, decline: [lr, betas]}",
    "relora": "preset: relora 0.88",
    "rows": f"moments: [{ROWS}]",
    "random": f"moments: [{rule('re:.*[.]weight', AT_RANDOM, AT_RANDOM)}]",
    "scale": f"moments: [{rule('* ndim=2', 'scale 0.5', 'scale 0.25')}]",
    "floor": f"moments: [{rule('*', 'keep', 'floor 1e-6')}]",
    "step": "step: 2",
    "schedule": "counters: {schedule: restart}",
    "keeps": "{hyperparameters: {keep: [betas]}, preset: reset, phase: kept}",
}
LAYOUTS = {
    "dp_reshardable": (Layout(), 2),
    "fully_reshardable": (Layout(format="fully_reshardable"), 2),
    "legacy": (Layout(format="torch"), 2),
    "not distributed": (Layout(distributed=False), 1),
    "not distributed, legacy": (Layout(distributed=False, format="torch"), 1),
    "experts": (Layout(experts=4, ep=2), 2),
    "torch AdamW": (Layout(adam="torch"), 1),
}
#: With the older versions of Megatron too.
EVERY_VERSION = {("dp_reshardable", "reset"), ("experts", "gradient scale")}
#: On these layouts every policy, on the others some of each kind.
IN_FULL = ("dp_reshardable", "legacy")
SOME = ("reset", "scale", "random", "step")
CELLS = [
    (layout, policy)
    for layout in LAYOUTS
    for policy in POLICIES
    if layout in IN_FULL or policy in SOME or (layout, policy) in EVERY_VERSION
]
#: Run without --all too: every policy, every layout, and both moments' rules on each format.
CHOSEN = {
    *((IN_FULL[n % 2], policy) for n, policy in enumerate(POLICIES) if policy not in SOME),
    *((layout, SOME[number % 4]) for number, layout in enumerate(LAYOUTS)),
    *EVERY_VERSION,
}
MORE = 3


_executed: list[tuple[str, str]] = []


@pytest.mark.parametrize(
    ("layout_name", "policy"),
    of_every_version(CELLS, EVERY_VERSION, CHOSEN),
    ids=map(", ".join, CELLS),
)
def test_a_restart_goes_on_as_if_there_had_been_none(
    layout_name: str, policy: str, ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    layout, world = LAYOUTS[layout_name]
    directory, _ = checkpoints.phase_1(layout, world)
    for found in ext.run(
        "tests.support.phases:begun_and_restarted",
        world,
        layout=layout,
        hyper=SECOND,
        directory=directory,
        policies={policy: POLICIES[policy]},
        target=str(tmp_path / "phase2"),
        steps=MORE,
    ):
        one = found[policy]
        assert one["begun"]["phase"]["state"] == "applied"
        assert one["restarted"]["phase"]["state"] == "continued"
        assert any("TRANSITION APPLIED" in line for line in one["begun"]["lines"])
        assert any("CONTINUED" in line for line in one["restarted"]["lines"])
        assert one["restarted"]["marks"] == one["begun"]["marks"]
        (mark,) = one["begun"]["marks"]
        assert sorted(json.loads(mark)) == ["done", "from", "offset", "operations", "phase"]
        whole, again = one["whole"], one["again"]
        for key in ("losses", "lrs", "steps", "num_steps"):
            assert again[key] == whole[key], key
        assert whole["state"].keys() == again["state"].keys()
        for name, tensors in whole["state"].items():
            for key, value in tensors.items():
                np.testing.assert_array_equal(again["state"][name][key], value, err_msg=name)
    _executed.append((layout_name, policy))


def test_so_many_cells_ran(request: pytest.FixtureRequest) -> None:
    if not _executed:
        pytest.skip("the matrix was deselected")
    ran = chosen(request, test_a_restart_goes_on_as_if_there_had_been_none)
    assert len(set(_executed)) == len(_executed) == ran
    assert (len(CELLS), len(CHOSEN)) == (47, 17)
    assert {layout for layout, _ in CHOSEN} == set(LAYOUTS)
    assert {policy for _, policy in CHOSEN} == set(POLICIES)


DP2 = LAYOUTS["dp_reshardable"]


def begin(
    ext: RankPool, checkpoints: Checkpoints, path: Path, policy: str, layout: Layout, world: int
) -> str:
    """The checkpoint of a phase that began with a policy."""
    directory, _ = checkpoints.phase_1(layout, world)
    ext.run(
        "tests.support.phases:saved_by_one_policy",
        world,
        layout=layout,
        hyper=SECOND,
        directory=directory,
        policy=policy,
        target=str(path),
        steps=MORE,
    )
    return str(path)


def test_what_is_a_new_transition_and_what_is_not(
    ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    layout, world = DP2
    begun = "{preset: reset-momentum, phase: second}"
    directory = begin(ext, checkpoints, tmp_path / "phase2", begun, layout, world)
    policies = {
        # The same operations under the same name, whatever the hyperparameters.
        begun: "continued",
        "{preset: reset-momentum, phase: second, hyperparameters: {keep: [eps]}}": "continued",
        # The flags left out: nothing to do twice, the phase goes on.
        "{phase: second}": "continued",
        "{}": "none",
        # A third phase.
        "{preset: reset-momentum, phase: third}": "applied",
        "{preset: reset-momentum}": "applied",
        "{preset: reset}": "applied",
        "{phase: third}": "applied",
    }
    for found in ext.run(
        "tests.support.phases:loaded",
        world,
        layout=layout,
        hyper=replace(SECOND, lr=5e-4),
        directory=directory,
        policies=list(policies),
    ):
        states = {p: f["phase"]["state"] for p, f in zip(policies, found, strict=True)}
        assert states == policies
        kept = {f["marks"][0] for f in found[:4]}
        assert len(kept) == 1
        assert not kept & {f["marks"][0] for f in found[4:]}


def test_a_name_stands_for_one_policy(
    ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    layout, world = DP2
    begun = "{preset: reset-momentum, phase: second}"
    directory = begin(ext, checkpoints, tmp_path / "phase2", begun, layout, world)
    for (found,) in ext.run(
        "tests.support.phases:loaded",
        world,
        layout=layout,
        hyper=SECOND,
        directory=directory,
        policies=["{preset: reset, phase: second}"],
    ):
        assert found["type"] == "PlanError"
        for word in ("--selective-phase second", "preset reset", "another name"):
            assert word in found["message"]


@pytest.mark.parametrize(
    "name", of_every_version(["dp_reshardable", "legacy", "not distributed"], ["dp_reshardable"])
)
def test_stock_carries_the_phase_on(
    name: str, stock: RankPool, ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    layout, world = LAYOUTS[name]
    policy = "preset: reset-momentum"
    directory = begin(ext, checkpoints, tmp_path / "phase2", policy, layout, world)
    target = str(tmp_path / "stock")
    stock.run(
        "tests.support.oracle:stock_resume",
        world,
        layout=layout,
        hyper=SECOND,
        directory=directory,
        more=2,
        save_to=target,
    )
    for (found,) in ext.run(
        "tests.support.phases:loaded",
        world,
        layout=layout,
        hyper=SECOND,
        directory=target,
        policies=[policy],
    ):
        assert found["phase"]["state"] == "continued"
        assert found["step"] == [STEPS + MORE + 2]


def test_the_schedule_starts_again_with_kept_moments(
    ext: RankPool, checkpoints: Checkpoints
) -> None:
    layout, world = DP2
    directory, _ = checkpoints.phase_1(layout, world)
    hyper = replace(SECOND, warmup_iters=5)
    for goes_on, restarts, with_the_iteration, and_yet_not in ext.run(
        "tests.support.phases:loaded",
        world,
        layout=layout,
        hyper=hyper,
        directory=directory,
        policies=[
            "{}",
            "counters: {schedule: restart}",
            "counters: {iteration: reset}",
            "counters: {iteration: reset, schedule: continue}",
        ],
    ):
        position = STEPS * GLOBAL_BATCH
        warm = hyper.lr * STEPS / hyper.warmup_iters
        assert (goes_on["num_steps"], goes_on["lr"]) == (position, pytest.approx(warm))
        assert (restarts["num_steps"], restarts["lr"]) == (0, 0.0)
        assert (with_the_iteration["num_steps"], with_the_iteration["lr"]) == (0, 0.0)
        assert (and_yet_not["num_steps"], and_yet_not["lr"]) == (position, pytest.approx(warm))
        assert restarts["step"] == [STEPS]


@pytest.mark.parametrize(
    ("layout", "world"),
    [
        (Layout(dtype="fp16"), 2),
        (Layout(dtype="fp16", format="torch"), 1),
        (Layout(dtype="fp16", distributed=False), 1),
        (Layout(dtype="fp16", distributed=False, format="torch"), 1),
    ],
    ids=["torch_dist", "legacy", "not distributed", "not distributed, legacy"],
)
def test_the_loss_scale_is_kept_or_reset(
    layout: Layout, world: int, ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    first, second = 2.0**12, 2.0**9
    directory, _ = checkpoints.phase_1(layout, world, replace(FIRST, loss_scale=first))
    hyper = replace(SECOND, loss_scale=second)
    reset = "counters: {grad_scaler: reset}"
    for kept, changed in ext.run(
        "tests.support.phases:loaded",
        world,
        layout=layout,
        hyper=hyper,
        directory=directory,
        policies=["{}", reset],
    ):
        assert (kept["loss_scale"], kept["scales"]) == ([first], [(first, first)])
        assert (changed["loss_scale"], changed["scales"]) == ([second], [(first, second)])
        assert " > loss scale: 512 (checkpoint 4096)" in changed["lines"]
        assert changed["phase"]["state"] == "applied"
    found = ext.run(
        "tests.support.phases:begun_and_restarted",
        world,
        layout=layout,
        hyper=hyper,
        directory=directory,
        policies={"reset": reset},
        target=str(tmp_path / "phase2"),
        steps=MORE,
    )
    for one in (rank["reset"] for rank in found):
        assert one["restarted"]["scales"] == [(second, second)]
        assert one["again"]["losses"] == one["whole"]["losses"]


def test_a_reset_without_a_loss_scale_says_so(ext: RankPool, checkpoints: Checkpoints) -> None:
    layout, world = DP2
    directory, _ = checkpoints.phase_1(layout, world)
    for (found,) in ext.run(
        "tests.support.phases:loaded",
        world,
        layout=layout,
        hyper=SECOND,
        directory=directory,
        policies=["counters: {grad_scaler: reset}"],
    ):
        assert any("no dynamic loss scale" in line for line in found["lines"])
