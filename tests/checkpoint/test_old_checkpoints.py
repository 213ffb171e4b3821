"""Checkpoints by real older Megatrons: read, resumed with other hyperparameters, converted."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from megatron_ext.checkpoint.stored import open_checkpoint
from tests.conftest import FIRST, STEPS
from tests.support.cells import chosen, with_all
from tests.support.harness import Hyper, Layout
from tests.support.old_ranks import OldRanks, assert_same_state, assert_worth_comparing
from tests.support.pool import ROOT, RankFailed, RankPool, overlay

pytestmark = pytest.mark.ranks

SECOND = Hyper(lr=1e-3, min_lr=1e-4, weight_decay=0.05, betas=(0.8, 0.9), eps=1e-6, train_iters=60)
BF16 = Layout()
MOE = Layout(experts=4, ep=2)

# megatron-core 0.14 does not know the shardings of later ones.
FORMATS = {
    "0.14.0": ("torch", "dp_zero_gather_scatter"),
    "0.15.3": ("torch", "dp_reshardable", "fully_reshardable"),
    "0.16.1": ("torch", "dp_reshardable", "fully_reshardable"),
    "0.18.2": ("torch", "dp_reshardable", "fully_reshardable"),
}
CELLS = [
    *((version, name) for version, names in FORMATS.items() for name in names),
    ("0.15.3", "moe"),
    ("0.15.3", "nemo"),
]
#: Every version, format and kind of model; the others are run with --all.
CHOSEN = {
    ("0.14.0", "dp_zero_gather_scatter"),
    *(("0.15.3", name) for name in ("torch", "moe", "nemo")),
    ("0.16.1", "fully_reshardable"),
    ("0.18.2", "dp_reshardable"),
}
RAN: list[tuple[str, str]] = []

POLICIES = {
    "keep": "{}",
    "scale": "moments: [{match: '*', exp_avg: scale 0.5, exp_avg_sq: scale 0.25}]",
    # Only what the two runs' groups share by their structural keys can be kept from the checkpoint.
    "kept weight decay": "hyperparameters: {keep: [weight_decay]}",
}


def layout_of(name: str) -> Layout:
    if name == "moe":
        return MOE
    return BF16 if name == "nemo" else replace(BF16, format=name)


@pytest.mark.parametrize(("version", "name"), with_all(CELLS, CHOSEN))
def test_moments_are_the_writers_and_hyperparameters_the_arguments(
    version: str, name: str, old: OldRanks, ext: RankPool
) -> None:
    layout = layout_of(name)
    old.start(FORMATS)
    directory, saved = old.write(version, layout, nemo=name == "nemo")
    found = ext.run(
        "tests.support.policies:resumed",
        2,
        layout=layout,
        hyper=SECOND,
        directory=directory,
        policies=POLICIES,
    )
    for of_rank in found:
        for policy, run in of_rank.items():
            half, quarter = (0.5, 0.25) if policy == "scale" else (1, 1)
            assert_same_state(run["state"], saved["state"], half, quarter)
            assert run["steps"] == [STEPS]
            decays = {0.0, FIRST.weight_decay if "kept" in policy else SECOND.weight_decay}
            assert {g["weight_decay"] for g in run["groups"]} | {0.0} == decays
            for group in run["groups"]:
                assert (group["max_lr"], group["min_lr"]) == (SECOND.lr, SECOND.min_lr)
                assert (group["betas"], group["eps"]) == (SECOND.betas, SECOND.eps)
                assert not any(key.startswith("pre_") for key in group)
    RAN.append((version, name))


@pytest.mark.parametrize(("version", "name"), with_all(CELLS, CHOSEN))
def test_the_directory_says_what_the_writer_says(version: str, name: str, old: OldRanks) -> None:
    layout = layout_of(name)
    directory, saved = old.write(version, layout, nemo=name == "nemo")
    found = open_checkpoint(Path(directory).parent)
    assert (found.iteration, str(found.directory)) == (STEPS, directory)
    assert found.format == ("torch" if name == "torch" else "torch_dist")
    assert found.sharding_type == (None if name == "torch" else layout.format)
    assert [o.step for o in found.optimizers] == [STEPS] * (2 if name == "moe" else 1)
    groups = [dict(g) for o in found.optimizers for g in o.groups]
    wanted = [{k.removeprefix("pre_"): v for k, v in g.items()} for g in saved["groups"]]
    assert groups == wanted
    assert all({"wd_mult", "lr_mult"} <= set(g) for g in groups)
    assert found.scheduler["num_steps"] == STEPS * 8
    assert (found.tensors == {}) == (name == "torch")


def test_an_older_megatron_refuses_a_newer_store_until_it_has_the_file(
    megatron: Version, stock: RankPool, old: OldRanks, tmp_path: Path
) -> None:
    if megatron < Version("0.19"):
        pytest.skip("this megatron-core writes the file itself")
    older = "0.18.2"
    directory = tmp_path / "it's the newer one's"
    both = dict(layout=BF16, hyper=FIRST, directory=str(directory))
    (saved, _) = stock.run("tests.support.old:written", 2, steps=STEPS, **both)
    path = os.pathsep.join([str(overlay(older)), str(ROOT)])
    plan = [sys.executable, "-m", "megatron_ext", "plan", str(directory), "--json"]
    more = ["--lr", "3e-3", "--train-iters", "40", "--global-batch-size", "8"]

    def planned(*words: str) -> dict[str, Any]:
        done = subprocess.run(
            [*plan, *more, *words],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 1, 2)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    for words in ((), ("--no-load-optim",)):
        (error,) = planned(*words)["errors"]
        assert error.startswith(f"{directory}: megatron-core {older} cannot open this checkpoint.")
    # What the run would have met after its model was built.
    ranks = old.ranks(older)
    with pytest.raises(RankFailed, match=r"common.pt does not exist"):
        ranks.run("tests.support.old:loaded", 2, **both)
    # The way out, as it is printed.
    (command,) = re.findall("python -c .*", error)
    command = command.replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(command, shell=True, check=True, capture_output=True)
    assert planned()["errors"] == []
    (found, _) = ranks.run("tests.support.old:loaded", 2, **both)
    assert found["steps"] == saved["steps"] == [STEPS]
    assert_worth_comparing(saved["state"])
    assert_same_state(found["state"], saved["state"])


def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 13
    assert (
        len(RAN)
        == len(set(RAN))
        == chosen(request, test_moments_are_the_writers_and_hyperparameters_the_arguments)
    )
