"""Copies of a checkpoint with other hyperparameters: stock Megatron resumes from them."""

from __future__ import annotations

import errno
import fractions
import itertools
import json
import os
import pathlib
import pickle
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version

from megatron_ext import cli
from megatron_ext.checkpoint.store import TRACKER, Store
from megatron_ext.checkpoint.stored import holds_checkpoint, open_checkpoint
from megatron_ext.errors import CheckpointError, PolicyError
from megatron_ext.offline.edit import Edited, edit
from megatron_ext.offline.edit_settings import parse_settings, plan_edit
from tests.checkpoint.test_stored import Evil, bend
from tests.conftest import FIRST, STEPS, Checkpoints
from tests.resume.test_resume import (
    MORE,
    assert_same_run,
    assert_same_state,
    assert_worth_comparing,
)
from tests.support.cells import chosen, of_every_version, with_all
from tests.support.checkpoints import checkpoint, checksums
from tests.support.edit_cases import SETTINGS
from tests.support.groups import group
from tests.support.harness import Hyper, Layout
from tests.support.old_ranks import OldRanks
from tests.support.pool import ROOT, RankPool

SECOND = Hyper(
    lr=1e-3,
    min_lr=1e-4,
    weight_decay=0.05,
    betas=(0.8, 0.9),
    eps=1e-6,
    train_iters=60,
    warmup_iters=3,
)
#: All that differs between the phases, so that the scheduler's check passes without a flag too.
WORDS = (
    "max_lr=1e-3 min_lr=1e-4 betas=0.8,0.9 eps=1e-6 weight_decay=0.05 "
    "lr_warmup_steps=24 lr_decay_steps=480 wd_incr_steps=480"
).split()

BF16 = Layout()
MOE = Layout(experts=4, ep=2)
# Layout on two ranks -> how many param_groups the checkpoint holds.
CELLS = {
    "dp_reshardable": (BF16, 2),
    "fully_reshardable": (replace(BF16, format="fully_reshardable"), 2),
    "torch": (replace(BF16, format="torch"), 2),
    "tp2": (replace(BF16, tp=2), 4),
    "tp2-torch": (replace(BF16, tp=2, format="torch"), 4),
    "moe": (MOE, 4),
    "moe-fully_reshardable": (replace(MOE, format="fully_reshardable"), 3),
    "moe-torch": (replace(MOE, format="torch"), 6),
    "replicated": (replace(BF16, distributed=False), 2),
    "pp2-vpp2": (replace(BF16, pp=2, vpp=2), 4),
}
#: With those of every version, one of each kind; the others are run with --all.
CHOSEN = {"moe-fully_reshardable", "replicated"}
OLD = [(v, f) for v in ("0.16.1", "0.18.2") for f in ("dp_reshardable", "fully_reshardable")]
RAN: list[str] = []


def changed(source: str | Path, target: Path, groups: int) -> Edited:
    """Edit all that differs; the source is as it was, and files that were not written are its."""
    source = Path(source)
    before, times = checksums(source), modified(source)
    done = edit(source, target, parse_settings(WORDS))
    assert (checksums(source), modified(source)) == (before, times)
    assert sum(c.key == "max_lr" and not c.in_scheduler for c in done.changes) == groups
    assert (target / TRACKER).read_text() == str(STEPS)
    assert done.directory == target / f"iter_{STEPS:07d}"
    same = 0
    for path in filter(Path.is_file, done.directory.rglob("*")):
        name = path.relative_to(done.directory)
        if str(name) not in done.written:
            assert path.read_bytes() == (source / name).read_bytes()
            assert path.stat().st_mtime_ns == (source / name).stat().st_mtime_ns
            same += 1
        if (source / name).exists():
            assert not path.samefile(source / name)
    assert same == done.copied + done.cloned > 0
    assert done.linked == 0
    return done


def modified(root: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in (root, *sorted(root.rglob("*")))}


def assert_resumed(found: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert_worth_comparing(theirs["loaded"])
        assert_same_state(ours["loaded"], theirs["loaded"])
        assert ours["loaded"]["groups"] == theirs["loaded"]["groups"]
        assert {g["max_lr"] for g in ours["loaded"]["groups"]} == {SECOND.lr}
        assert {g["betas"] for g in ours["loaded"]["groups"]} == {SECOND.betas}
        assert_same_run(ours, theirs)


@pytest.mark.ranks
@pytest.mark.parametrize("name", of_every_version(CELLS, ["dp_reshardable", "torch"], CHOSEN))
def test_stock_resumes_from_the_copy(
    name: str, stock: RankPool, checkpoints: Checkpoints, megatron: Version, tmp_path: Path
) -> None:
    layout, groups = CELLS[name]
    directory, _ = checkpoints.phase_1(layout, 2)
    second = dict(layout=layout, hyper=SECOND, more=MORE)
    if name == "dp_reshardable":
        # What the command is for: without it stock does not resume at another rate.
        plain = dict(layout=layout, hyper=SECOND, directory=directory)
        if megatron >= Version("0.19"):
            assert stock.run("tests.support.oracle:stock_error", 2, **plain)[0][0]
        else:
            (stale, _) = stock.run("tests.support.oracle:stock_resume", 2, more=MORE, **plain)
            assert {g["max_lr"] for g in stale["loaded"]["groups"]} == {FIRST.lr}
    done = changed(directory, tmp_path / "new", groups)
    expected = stock.run(
        "tests.support.oracle:corrected_load",
        2,
        layout=layout,
        first=FIRST,
        second=SECOND,
        directory=directory,
        more=MORE,
    )
    for override in (True, False):
        run = dict(directory=str(done.directory), override=override)
        assert_resumed(stock.run("tests.support.oracle:stock_resume", 2, **second, **run), expected)
    RAN.append(name)


@pytest.mark.ranks
@pytest.mark.matrix
def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 10
    assert len(RAN) == len(set(RAN)) == chosen(request, test_stock_resumes_from_the_copy)


@pytest.mark.ranks
@pytest.mark.parametrize(("version", "format"), with_all(OLD, OLD[:2]))
def test_the_installed_megatron_resumes_from_an_old_one(
    version: str, format: str, old: OldRanks, stock: RankPool, tmp_path: Path
) -> None:
    layout = replace(BF16, format=format)
    directory, _ = old.write(version, layout)
    assert (Path(directory) / "common.pt").is_file()
    done = changed(directory, tmp_path / "new", 2)
    both = dict(layout=layout, more=MORE)
    expected = stock.run(
        "tests.support.oracle:corrected_load",
        2,
        first=FIRST,
        second=SECOND,
        directory=directory,
        **both,
    )
    found = stock.run(
        "tests.support.oracle:stock_resume",
        2,
        hyper=SECOND,
        directory=str(done.directory),
        override=False,
        **both,
    )
    assert_resumed(found, expected)


@pytest.mark.ranks
def test_an_edit_of_an_edit(checkpoints: Checkpoints, tmp_path: Path) -> None:
    directory, _ = checkpoints.phase_1(BF16, 2)
    edit(directory, tmp_path / "a", {"max_lr": 2e-3})
    done = edit(tmp_path / "a", tmp_path / "b", {"max_lr": 4e-3})
    assert {c.old for c in done.changes} == {2e-3}
    assert "__edited_1.distcp" in done.written
    (saved,) = open_checkpoint(tmp_path / "b").optimizers
    assert {g["max_lr"] for g in saved.groups} == {4e-3}


@pytest.mark.ranks
def test_tensors_of_a_legacy_file_are_the_same_bytes(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    directory, _ = checkpoints.phase_1(CELLS["torch"][0], 2)
    done = edit(directory, tmp_path / "new", SETTINGS)
    (name,) = done.written
    assert name.endswith("model_optim_rng.pt")
    before = torch.load(Path(directory) / name, weights_only=False)
    after = torch.load(done.directory / name, weights_only=False)
    tensors = [k for k, v in before["model"].items() if isinstance(v, torch.Tensor)]
    assert len(tensors) > 10
    for key in tensors:
        ours, theirs = after["model"][key], before["model"][key]
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.ranks
@pytest.mark.parametrize(("name", "kills"), [("dp_reshardable", 31), ("torch", 19)])
def test_a_kill_leaves_nothing_or_all(
    name: str, kills: int, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    source = Path(checkpoints.phase_1(CELLS[name][0], 2)[0])
    before, times = checksums(source), modified(source)
    wanted = edit(source, tmp_path / "whole", SETTINGS)
    killed_at_each(source, tmp_path, wanted, kills)
    assert (checksums(source), modified(source)) == (before, times)


def killed_at_each(source: Path, tmp_path: Path, wanted: Edited, kills: int) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    command = [sys.executable, "-m", "tests.support.edit_cases", str(source), str(runs)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    operations = [tuple(o) for o in json.loads(done.stdout)]
    complete = checksums(wanted.directory.parent)
    numbers = sorted(int(p.name) for p in runs.iterdir())
    assert numbers == list(range(1, len(operations) + 2))
    assert len(operations) == kills
    found = [holds_checkpoint(runs / str(n) / "new") for n in numbers]
    # There from the rename on, which nothing but the parent's fsync follows.
    assert found == [False] * (len(numbers) - 2) + [True] * 2
    for number, there in zip(numbers, found, strict=True):
        if there:
            assert checksums(runs / str(number) / "new") == complete
        else:
            assert not (runs / str(number) / "new").exists()
    assert [name for name, _ in operations[-2:]] == ["os.rename", "fsync"]
    kinds = {name for name, _ in operations}
    assert kinds == {"os.mkdir", "os.rename", "os.chmod", "os.utime", "open", "half", "fsync"}
    on_disk = {Path(p).name for name, p in operations[:-2] if name == "fsync"}
    assert {Path(p).name for p in (*wanted.written, TRACKER, wanted.directory)} <= on_disk


def state_of(directory: Path) -> dict[str, Any]:
    """The common state of a torch_dist checkpoint."""
    found: dict[str, Any] = {}

    def load(file: Any) -> Any:
        (state,) = torch.load(file, weights_only=False)
        found.update(state)
        return [state]

    Store(directory).object("common_state/shard_0_1", load)
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("file", ["common.pt", "common_state", ".metadata", "model_optim_rng.pt"])
def test_nothing_in_a_checkpoint_runs(
    file: str, checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a place that reading passes over, so that the loading has to refuse it."""
    marker = tmp_path / "ran"
    name = "torch" if file == "model_optim_rng.pt" else "fully_reshardable"
    directory, _ = checkpoints.phase_1(CELLS[name][0], 2)

    def payload(data: bytes) -> bytes:
        if file == ".metadata":
            index = pickle.loads(data)
            index.storage_meta = Evil(marker)
            return pickle.dumps(index)
        path = tmp_path / "payload"
        if file == "model_optim_rng.pt":
            path.write_bytes(data)
            state = torch.load(path, weights_only=False)
        else:
            state = state_of(Path(directory))
        state["args"] = Evil(marker)
        torch.save([state] if file == "common_state" else state, path)
        return path.read_bytes()

    bend(file, directory, tmp_path, payload)
    out = tmp_path / "new"
    command = ["edit", str(tmp_path / "bent"), "--out", str(out), "--set", "max_lr=1e-3"]
    assert cli.main(command) == 2
    assert not marker.exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"bent/{file}" in said or f"bent: {file}" in said or f"/{file}: expected" in said
    assert "needs posix.system, which is not on the list" in said
    assert "pass --allow-pickle" in said
    assert not out.exists()
    assert not list(tmp_path.glob(".new*"))
    # The payload works: what the flag says is what it does.
    cli.main([*command, "--allow-pickle"])
    assert marker.exists()


BESIDE_PLAIN_DATA = {
    "save": pathlib.PurePosixPath("/x"),
    "params_dtype": torch.bfloat16,
    "state": np.random.RandomState(1).get_state(),
    "not_a_number": float("nan"),
}
#: Edits the checkpoints that it is given, in a process that has not imported Megatron before.
EDIT_EACH = """
import sys
from megatron_ext.cli import main
for name in sys.argv[1:]:
    if main(["edit", name, "--out", name + "-new", "--set", "max_lr=1e-3"]):
        sys.exit(f"{name}: failed")
"""


def test_what_megatron_saves_beside_plain_data_is_kept(tmp_path: Path) -> None:
    """In a new process: Megatron's import adds to what torch allows. Enums, which need it, last."""
    from megatron.core.transformer.enums import AttnBackend

    cells = list(itertools.product((False, True), ("torch", "torch_dist")))
    sources = []
    for enums, format in cells:
        changes = BESIDE_PLAIN_DATA | ({"attention_backend": AttnBackend.flash} if enums else {})
        directory = tmp_path / f"{format}-{enums}"
        sources.append(checkpoint(directory, format=format, changes=changes))
    subprocess.run([sys.executable, "-c", EDIT_EACH, *map(str, sources)], cwd=ROOT, check=True)
    for (enums, format), source in zip(cells, sources, strict=True):
        name = "common.pt" if format == "torch_dist" else "mp_rank_00/model_optim_rng.pt"
        saved = torch.load(f"{source}-new/iter_0000010/{name}", weights_only=False)
        found = vars(saved["args"])
        assert found.get("attention_backend") is (AttnBackend.flash if enums else None)
        for key in ("save", "params_dtype"):
            assert found[key] == BESIDE_PLAIN_DATA[key]
        np.testing.assert_array_equal(found["state"][1], BESIDE_PLAIN_DATA["state"][1])


def test_another_class_needs_the_flag(tmp_path: Path) -> None:
    changes = {"share": fractions.Fraction(1, 3)}
    source = checkpoint(tmp_path / "source", changes=changes)
    with pytest.raises(CheckpointError, match=r"needs fractions\.Fraction, which .*--allow-pickle"):
        edit(source, tmp_path / "new", {"max_lr": 1e-3})
    done = edit(source, tmp_path / "new", {"max_lr": 1e-3}, allow_pickle=True)
    (name,) = done.written
    found = torch.load(done.directory / name, weights_only=False)["args"]
    assert found.share == fractions.Fraction(1, 3)


def test_a_rate_in_a_tensor_stays_in_one(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source")
    (path,) = source.rglob("model_optim_rng.pt")
    state = torch.load(path, weights_only=False)
    for saved in state["optimizer"]["optimizer"]["param_groups"]:
        saved["max_lr"] = torch.tensor(0.5)
    torch.save(state, path)
    done = edit(source, tmp_path / "new", {"max_lr": 1e-3})
    state = torch.load(done.directory / done.written[0], weights_only=False)
    for saved in state["optimizer"]["optimizer"]["param_groups"]:
        assert torch.equal(saved["max_lr"], torch.tensor(1e-3))


def test_a_release_and_an_iteration_keep_their_names(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", release=True)
    done = edit(source, tmp_path / "new", {"max_lr": 1e-3})
    assert (done.directory.name, (tmp_path / "new" / TRACKER).read_text()) == ("release", "release")
    for iteration in (5, 10):
        checkpoint(tmp_path / "two", iteration)
    done = edit(tmp_path / "two", tmp_path / "newer", {"max_lr": 1e-3}, iteration=5)
    assert [p.name for p in (tmp_path / "newer").iterdir() if p.is_dir()] == ["iter_0000005"]
    assert open_checkpoint(tmp_path / "newer").iteration == done.iteration == 5


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["dp_reshardable", "torch"])
@pytest.mark.parametrize("hard_links", [False, True])
def test_a_save_into_the_copy_leaves_the_source(
    name: str, hard_links: bool, stock: RankPool, tmp_path: Path
) -> None:
    """Megatron writes into the files of an iteration that exists, hard links or not."""
    run = dict(layout=CELLS[name][0], steps=STEPS, hyper=FIRST)
    phase_1, source, copy = "tests.support.mapped_stock:phase_1", tmp_path / "a", tmp_path / "b"
    stock.run(phase_1, 1, **run, directory=str(source))
    before = checksums(source)
    done = edit(source, copy, {"max_lr": 1e-3}, hard_links=hard_links)
    assert bool(done.linked) == hard_links
    stock.run(phase_1, 1, **{**run, "hyper": SECOND}, directory=str(done.directory))
    assert (checksums(source) == before) != hard_links


def test_what_a_link_leads_to_is_not_copied(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", format="torch_dist")
    iteration = source / "iter_0000010"
    (tmp_path / "secret").write_text("secret")
    (iteration / "inside.json").symlink_to(iteration / "metadata.json")
    done = edit(source, tmp_path / "new", {"max_lr": 1e-3})
    assert not (done.directory / "inside.json").is_symlink()
    data = (iteration / "metadata.json").read_bytes()
    assert (done.directory / "inside.json").read_bytes() == data
    for name, leads_to in (("file", tmp_path / "secret"), ("directory", tmp_path), ("gone", "no")):
        (iteration / name).symlink_to(leads_to)
        with pytest.raises(CheckpointError, match=f"{name}: expected a file .* symbolic link to "):
            edit(source, tmp_path / "newer", {"max_lr": 1e-3})
        (iteration / name).unlink()
    os.mkfifo(iteration / "pipe")
    with pytest.raises(CheckpointError, match="pipe: expected a regular file"):
        edit(source, tmp_path / "newer", {"max_lr": 1e-3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "secret", "source"]


@pytest.mark.parametrize("reason", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_links_cannot_be_made_files_are_copied(
    reason: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = checkpoint(tmp_path / "source", format="torch_dist")
    monkeypatch.setattr(os, "link", fails(reason))
    done = edit(source, tmp_path / "new", {"max_lr": 1e-3}, hard_links=True)
    assert (done.linked, done.copied + done.cloned) == (0, 2)
    for name in ("metadata.json", ".metadata"):
        data = (source / "iter_0000010" / name).read_bytes()
        assert (done.directory / name).read_bytes() == data


def fails(reason: int) -> Callable[..., None]:
    def link(source: Path, target: Path) -> None:
        raise OSError(reason, os.strerror(reason), str(source))

    return link


@pytest.mark.parametrize(("name", "limit"), [("common.pt", 200), ("big.json", 100_000)])
def test_a_file_that_cannot_be_written_leaves_nothing(
    name: str, limit: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a full disk, where torch.save writes and where a file is copied."""
    source = checkpoint(tmp_path / "source", format="torch_dist")
    (source / "iter_0000010" / "big.json").write_bytes(b" " * 200_000)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
    try:
        code = cli.main(["edit", str(source), "--out", str(tmp_path / "new"), "--set", "eps=1"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    said = capfd.readouterr().err
    assert code == 2
    assert said.count("\n") == 1
    assert name in said
    assert "File too large" in said
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


GROUPS = [
    group(max_lr=3e-3, min_lr=3e-4, is_expert_parallel=False, wd_mult=1.0, weight_decay=0.1),
    group(max_lr=1e-3, min_lr=1e-4, is_expert_parallel=True, wd_mult=0.0, weight_decay=0.0),
]
STATE = {
    "optimizer": {"optimizer": {"param_groups": GROUPS}},
    "opt_param_scheduler": {
        "max_lr": 3e-3,
        "min_lr": 3e-4,
        "num_steps": 8,
        "start_wd": 0.1,
        "end_wd": 0.1,
    },
}


def planned(settings: dict[str, Any], **group: Any) -> list[tuple[Any, ...]]:
    """Where, old and new of each change."""
    changes = plan_edit({"x": STATE}, settings, group)
    return [("scheduler" if c.in_scheduler else c.path[-1], c.old, c.new) for c in changes]


def test_the_scheduler_follows_the_groups_that_have_its_value() -> None:
    main, experts = {"is_expert_parallel": False}, {"is_expert_parallel": True}
    wanted = [(0, 3e-3, 2e-3), ("scheduler", 3e-3, 2e-3)]
    assert planned({"max_lr": 2e-3}, **main) == wanted
    assert planned({"max_lr": 2e-3}, **experts) == [(1, 1e-3, 2e-3)]
    assert planned({"eps": 1e-6}) == [(0, 1e-8, 1e-6), (1, 1e-8, 1e-6)]
    assert planned({"start_wd": 0}) == [("scheduler", 0.1, 0.0)]
    assert planned({"num_steps": 0}) == [("scheduler", 8, 0)]
    # Of two groups with the scheduler's value neither decides about it alone.
    alike = [dict(saved, max_lr=3e-3) for saved in GROUPS]
    state = {**STATE, "optimizer": {"optimizer": {"param_groups": alike}}}
    changes = plan_edit({"x": state}, {"max_lr": 2e-3}, main)
    assert [c.path for c in changes] == [("optimizer", "optimizer", "param_groups", 0)]
    assert len(plan_edit({"x": state}, {"max_lr": 2e-3})) == 3


def test_weight_decay_is_multiplied_as_the_scheduler_does() -> None:
    bounds = [("scheduler", 0.1, 0.05)] * 2
    assert planned({"weight_decay": 0.05}) == [(0, 0.1, 0.05), (1, 0.0, 0.0), *bounds]
    # A group's own bounds are set where it has them; another group without any has the scheduler's.
    own = {
        "x": {**STATE, "optimizer": {"param_groups": [group(start_wd=0.1, end_wd=0.1), group()]}}
    }
    own["x"]["optimizer"]["param_groups"][1]["wd_mult"] = 0.0
    changes = plan_edit(own, {"weight_decay": 0.05}, {"wd_mult": 1.0})
    assert [(c.key, c.path[-1], c.new) for c in changes] == [
        ("weight_decay", 0, 0.05),
        ("start_wd", 0, 0.05),
        ("end_wd", 0, 0.05),
    ]
    # Without a scheduler of Megatron's nothing overwrites it.
    alone = {"x": {"optimizer": {"param_groups": [group()]}}}
    assert [c.key for c in plan_edit(alone, {"weight_decay": 0.05, "lr": 1e-4})] == [
        "weight_decay",
        "lr",
    ]


def test_a_weight_decay_that_changes_has_two_bounds() -> None:
    state = {**STATE, "opt_param_scheduler": {**STATE["opt_param_scheduler"], "end_wd": 0.2}}
    with pytest.raises(
        PolicyError, match=r"from 0.1 \(start_wd\) to 0.2 .*Set start_wd and end_wd"
    ):
        plan_edit({"x": state}, {"weight_decay": 0.05})
    both = plan_edit({"x": state}, {"weight_decay": 0.05, "start_wd": 0.05, "end_wd": 0.05})
    assert [(c.key, c.new) for c in both if c.in_scheduler] == [
        ("start_wd", 0.05),
        ("end_wd", 0.05),
    ]
    none = {**STATE, "opt_param_scheduler": {"max_lr": 3e-3, "num_steps": 8}}
    with pytest.raises(PolicyError, match=r"holds neither. .* give --weight-decay to the run"):
        plan_edit({"x": none}, {"weight_decay": 0.05})


def test_nemos_names_are_found() -> None:
    saved = dict(GROUPS[0])
    saved["pre_wd_mult"] = saved.pop("wd_mult")
    state = {"optimizer": {"param_groups": [saved]}}
    (change,) = plan_edit({"x": state}, {"wd_mult": 0.5}, {"wd_mult": 1.0})
    assert (change.key, change.path) == ("pre_wd_mult", ("optimizer", "param_groups", 0))


@pytest.mark.parametrize(
    ("settings", "group", "message"),
    [
        ("momentum=0.9", "", r"momentum: no such key is saved; expected one of the param_groups' "),
        ("betas=0.9", "", r"betas: expected 2 values with commas as in a param_group of x, which"),
        ("betas=0.9,0.9,0.9", "", r"betas: expected 2 values .* found \(0.9, 0.9, 0.9\)"),
        ("betas=0.9,high", "", r"betas: expected a number as in .* found 'high'"),
        ("eps=small", "", r"eps: expected a number as in .* has 1e-08; found 'small'"),
        ("eps=true", "", r"eps: expected a number .* found True"),
        ("eps=nan", "", r"eps: expected a number .* found nan"),
        ("eps=none", "", r"eps: expected a number .* found None"),
        ("num_steps=1.5", "", r"num_steps: expected a whole number as in opt_param_scheduler of x"),
        ("is_expert_parallel=1", "wd_mult=1", r"expected true or false .* found 1"),
        ("step=0", "", r"step: it is optimizer state, not a hyperparameter"),
        (
            "max_lr=1",
            "",
            r"hold 0.001 and 0.003, .*Choose .* with --group, .* --group max_lr=0.001",
        ),
        (
            "max_lr=1e-5",
            "max_lr=0.003",
            r"expected min_lr <= max_lr.*min_lr 0.0003 and max_lr 1",
        ),
        ("eps=1", "wd_mult=7", r"wd_mult=7: fits no param_group.* have wd_mult=0.0 \| wd_mult=1.0"),
        ("eps=1", "color=red", r"color=red: fits no param_group; the checkpoint's have no color"),
        ("lr=1e-4", "", r"--set lr: .* no effect; expected max_lr and min_lr"),
        ("weight_decay=0.2", "wd_mult=1", r"weight_decay: .* none of their own. Leave out --group"),
        ("weight_decay=0.2 end_wd=0.3", "", r"weight_decay=0.2 end_wd=0.3: .* contradict"),
        ("start_wd=0.2", "wd_mult=1", r"start_wd: only the scheduler has.* Leave out --group"),
        ("eps", "", r"--set: expected KEY=VALUE, found 'eps'"),
        ("eps=", "", r"--set: expected KEY=VALUE, found 'eps='"),
        ("eps=1 eps=2", "", r"--set: 'eps' is given twice"),
        ("", "", r"--set: expected at least one KEY=VALUE, found none"),
    ],
)
def test_bad_settings_are_named(settings: str, group: str, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        plan_edit({"x": STATE}, parse_settings(settings.split()), parse_settings(group.split()))


def test_the_command_says_what_it_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "source", format="torch_dist")
    command = ["edit", str(source), "--set", "max_lr=1e-3", "eps=1e-6", "--out"]
    (tmp_path / "empty").mkdir()
    assert cli.main([*command, str(tmp_path / "empty")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path / 'empty' / 'iter_0000010'}: iteration 10"
    old = GROUPS[0]["eps"]
    assert f"  groups: eps {old!r} -> 1e-06 (2)" in said
    assert "  scheduler: max_lr 0.0003 -> 0.001" in said
    assert re.fullmatch("  files: 2 (copied|cloned), 1 written", said[-3])
    # The groups' min_lr is not the scheduler's: this checkpoint's has none.
    assert said[-2].startswith("flags for stock Megatron: --lr 0.001 --min-lr 0.0003 --adam-beta1 ")
    assert said[-2].endswith(" --override-opt_param-scheduler")
    assert said[-1].startswith("  no flag gives the copy's min_lr; with --override-opt_param-")
    assert cli.main([*command, str(tmp_path / "new"), "--group", "wd_mult=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(c["in"], c["key"]) for c in found["changes"]] == [
        ("group", "max_lr"),
        ("group", "eps"),
    ]
    assert found["written"] == ["common.pt"]
    # Only one of two groups was edited, which stock's one --lr does not give.
    assert found["flags"][:4] == ["--lr", "0.003", "--min-lr", "0.0003"]
    assert (found["inexpressible"], found["several"]) == (["max_lr", "min_lr"], ["max_lr"])


def test_a_bad_command_ends_with_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "source", format="torch_dist")
    before = checksums(tmp_path)
    new = str(tmp_path / "new")
    cells = {
        "source exists": [str(source), "--out", str(source), "--set", "eps=1"],
        "momentum: no such key": [str(source), "--out", new, "--set", "momentum=1"],
        "fits no param_group": [str(source), "--out", new, "--set", "eps=1", "--group", "a=1"],
        "iter_0000099 does not exist": [
            *(str(source), "--out", new, "--set", "eps=1", "--iteration", "99"),
        ],
        "expected a checkpoint directory": [f"{new}er", "--out", new, "--set", "eps=1"],
        "lies in the checkpoint itself": [
            *(str(source), "--out", str(source / "x"), "--set", "eps=1"),
        ],
        "does not exist: make it": [str(source), "--out", f"{new}/x", "--set", "eps=1"],
    }
    for wanted, arguments in cells.items():
        assert cli.main(["edit", *arguments]) == 2
        said = capsys.readouterr()
        assert wanted in said.err
        assert (said.err.count("\n"), said.out) == (1, "")
    assert checksums(tmp_path) == before
    path = source / "iter_0000010" / "common.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert cli.main(["edit", str(source), "--out", new, "--set", "eps=1"]) == 2
    assert f"cannot read {path}" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_the_command_line_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, megatron_ext.cli.edit; "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'megatron')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
