"""Bad input: one clear error on every rank, nothing changed, nothing left hanging."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoint.test_stored import Evil
from tests.conftest import Checkpoints
from tests.resume.test_resume import SAME, SECOND
from tests.support.cells import of_every_version
from tests.support.harness import Hyper, Layout
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

# fault -> (layout, error on the rank at fault, words in its message)
FAULTS = {
    "unknown-key": ("dp2", "PlanError", ["momentum_of_inertia", "Known keys:", "betas"]),
    "damaged-groups": ("dp2", "CheckpointError", ["step", "999", "--no-load-optim"]),
    "no-groups": ("dp2", "CheckpointError", ["no optimizer state", "--no-load-optim"]),
    "unreadable-file": ("dp2-legacy", "CheckpointError", ["distrib_optim.pt", "Input/output"]),
}


def _files(directory: str) -> dict[str, str]:
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(directory).rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize(
    ("fault", "faulty"),
    of_every_version(
        itertools.product(FAULTS, (0, 1)), [("damaged-groups", 1), ("unreadable-file", 0)]
    ),
)
def test_a_fault_on_one_rank_stops_every_rank(
    fault: str, faulty: int, ext: RankPool, checkpoints: Checkpoints
) -> None:
    name, error, words = FAULTS[fault]
    layout, world = SAME[name]
    if fault == "unreadable-file" and faulty != 0:
        pytest.skip("only data-parallel rank 0 reads the file")
    directory, _ = checkpoints.phase_1(layout, world)
    before = _files(directory)
    results = ext.run(
        "tests.support.faults:on_one_rank",
        world,
        timeout=80,
        fault=fault,
        layout=layout,
        hyper=SECOND,
        directory=directory,
        faulty=faulty,
    )
    assert results[faulty]["type"] == error
    for word in words:
        assert word in results[faulty]["message"]
    other = results[1 - faulty]
    assert other["type"] == "AgreementError"
    assert f"rank {faulty}: {error}" in other["message"]
    assert words[0] in other["message"]
    for result in results:
        assert result["collectives_work"]
        assert result["unchanged"] or fault == "unreadable-file"
    assert _files(directory) == before


def test_different_policies_stop_every_rank(ext: RankPool, checkpoints: Checkpoints) -> None:
    layout, world = SAME["dp2"]
    directory, _ = checkpoints.phase_1(layout, world)
    results = ext.run(
        "tests.support.faults:on_one_rank",
        world,
        timeout=80,
        fault="other-policy",
        layout=layout,
        hyper=SECOND,
        directory=directory,
    )
    for result in results:
        assert result["type"] == "AgreementError"
        said = "policy, keep_hyperparameters: () on rank 0, ('eps',) on rank 1"
        assert said in result["message"]
        assert result["unchanged"]
        assert result["collectives_work"]


def test_an_ambiguous_kept_key(ext: RankPool, checkpoints: Checkpoints) -> None:
    """Two saved groups fit one current group and differ in a key that is to be kept."""
    layout, world = SAME["dp2"]
    # Two saved groups that are no default group, told apart by nothing but their bounds.
    first = Hyper(decoupled_lr=5e-3, decoupled_min_lr=5e-4, extra_group=True)
    second = replace(SECOND, decoupled_lr=7e-4, decoupled_min_lr=7e-5, extra_group=True)
    directory, _ = checkpoints.phase_1(layout, world, first)
    for kind, message in ext.run(
        "tests.support.faults:keeps",
        world,
        layout=layout,
        hyper=second,
        directory=directory,
        policy={"keep_hyperparameters": ("max_lr",)},
    ):
        assert kind == "PlanError"
        assert "'max_lr'" in message
        assert message.count("saved group ") == 2
        assert "0.005" in message
        assert "0.0015" in message


MISFITS = {
    "another tensor parallel size": (
        Layout(),
        Layout(tp=2),
        ["does not fit", "optimizer.distributed.dp_group_idx_", "fully-reshardable"],
    ),
    "another precision": (
        Layout(),
        Layout(dtype="fp32"),
        ["state is that of bfloat16 weights, the model has float32 ones", "--bf16", "convert"],
    ),
    "another model": (
        Layout(format="fully_reshardable"),
        Layout(format="fully_reshardable", hidden=32),
        ["do not have the same parameters", "has shape (16,) there, (32,) in the model"],
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_shards_that_do_not_fit_the_model(
    name: str, ext: RankPool, checkpoints: Checkpoints
) -> None:
    before, after, words = MISFITS[name]
    directory, _ = checkpoints.phase_1(before, 2)
    for result in ext.run(
        "tests.support.faults:resume_other_model",
        2,
        timeout=80,
        layout=after,
        hyper=SECOND,
        directory=directory,
    ):
        assert result["type"] == "CheckpointError", result["trace"]
        for word in words:
            assert word in result["message"]


def test_a_legacy_file_of_another_model(
    ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    layout, world = SAME["dp2-legacy"]
    directory, _ = checkpoints.phase_1(layout, world)
    other, _ = checkpoints.phase_1(replace(layout, hidden=32), world)
    mixed = tmp_path / "mixed"
    shutil.copytree(directory, mixed)
    target = next(mixed.rglob("distrib_optim.pt"))
    target.write_bytes(next(Path(other).rglob("distrib_optim.pt")).read_bytes())
    results = ext.run(
        "tests.support.faults:resume_other_model",
        world,
        timeout=80,
        layout=layout,
        hyper=SECOND,
        directory=str(mixed),
    )
    # Data-parallel rank 0 alone sees the file.
    assert [r["type"] for r in results] == ["CheckpointError", "AgreementError"]
    for result in results:
        for word in ("does not fit", "buffer 0", "--no-load-optim"):
            assert word in result["message"]


def test_a_missing_parameter_file(ext: RankPool, checkpoints: Checkpoints, tmp_path: Path) -> None:
    layout, world = SAME["dp2-legacy"]
    directory, _ = checkpoints.phase_1(layout, world)
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    next(copy.rglob("distrib_optim.pt")).unlink()
    results = ext.run(
        "tests.support.faults:resume_other_model",
        world,
        timeout=80,
        layout=layout,
        hyper=SECOND,
        directory=str(copy),
    )
    assert [r["type"] for r in results] == ["CheckpointError", "AgreementError"]
    for result in results:
        assert "distrib_optim.pt" in result["message"]
        assert "--no-load-optim" in result["message"]


def test_a_parameter_file_is_not_run(
    ext: RankPool, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    """``torch.load`` refuses a pickle that holds more than tensors and plain values."""
    layout, world = SAME["dp2-legacy"]
    directory, _ = checkpoints.phase_1(layout, world)
    copy, marker = tmp_path / "copy", tmp_path / "ran"
    shutil.copytree(directory, copy)
    path = next(copy.rglob("distrib_optim.pt"))
    torch.save({**torch.load(path), "more": Evil(marker)}, path)
    results = ext.run(
        "tests.support.faults:resume_other_model",
        world,
        timeout=80,
        layout=layout,
        hyper=SECOND,
        directory=str(copy),
    )
    assert [r["type"] for r in results] == ["CheckpointError", "AgreementError"]
    for result in results:
        assert "Weights only load failed" in result["message"]
    assert not marker.exists()


BUILD = {
    "sgd": (
        {"optimizer": "sgd"},
        Layout(),
        [
            "--optimizer sgd and --use-distributed-optimizer",
            "Leave --use-distributed-optimizer out",
        ],
    ),
    "overlap with the step": (
        {"overlap_param_gather_with_optimizer_step": True},
        Layout(),
        ["--overlap-param-gather-with-optimizer-step"],
    ),
    "fsdp": ({"use_megatron_fsdp": True}, Layout(), ["--use-megatron-fsdp"]),
    "not importable": (
        {"optimizer_class": "no_such_package.Adam"},
        Layout(),
        ["no_such_package.Adam", "cannot be imported"],
    ),
    "no such name": (
        {"optimizer_class": "megatron_ext.NoSuchAdam"},
        Layout(),
        ["megatron_ext.NoSuchAdam", "cannot be imported"],
    ),
    "no subclass": (
        {"optimizer_class": "torch.optim.AdamW"},
        Layout(),
        ["torch.optim.AdamW", "expected a subclass of", "DistributedOptimizer"],
    ),
    "no module": ({"optimizer_class": "SelectiveAdam"}, Layout(), ["dotted path"]),
    "another class without a distributed optimizer": (
        {"optimizer_class": "tests.support.custom.Renamed"},
        Layout(distributed=False),
        ["tests.support.custom.Renamed", "--use-distributed-optimizer"],
    ),
}


@pytest.mark.parametrize("name", BUILD)
def test_what_cannot_be_built(name: str, ext: RankPool) -> None:
    config, layout, words = BUILD[name]
    for kind, message in ext.run(
        "tests.support.faults:build_error", 2, layout=layout, hyper=SECOND, **config
    ):
        assert kind == "HostError"
        for word in words:
            assert word in message


@pytest.mark.matrix
def test_any_subclass_may_be_named(ext: RankPool) -> None:
    results = ext.run(
        "tests.support.faults:build_error",
        1,
        layout=Layout(),
        hyper=SECOND,
        optimizer_class="tests.support.custom.Renamed",
    )
    assert results == [("", "")]
