"""What is read of a checkpoint directory, and that nothing in it runs."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint import store, stored
from megatron_ext.checkpoint.stored import holds_checkpoint, open_checkpoint
from megatron_ext.errors import CheckpointError
from tests.conftest import FIRST, STEPS, Checkpoints
from tests.support.cells import of_every_version
from tests.support.harness import Layout
from tests.support.pool import RankPool

BF16 = Layout()
MOE = Layout(experts=4, ep=2)

LAYOUTS = {
    "dp_reshardable": (BF16, "torch_dist", "dp_reshardable"),
    "fully_reshardable": (
        replace(BF16, format="fully_reshardable"),
        "torch_dist",
        "fully_reshardable",
    ),
    "torch": (replace(BF16, format="torch"), "torch", None),
    "replicated": (replace(BF16, distributed=False), "torch_dist", None),
    "replicated-torch": (replace(BF16, distributed=False, format="torch"), "torch", None),
    "fp32-adamw": (
        replace(BF16, dtype="fp32", adam="torch", distributed=False),
        "torch_dist",
        None,
    ),
    "moe": (MOE, "torch_dist", "dp_reshardable"),
    "moe-fully_reshardable": (
        replace(MOE, format="fully_reshardable"),
        "torch_dist",
        "fully_reshardable",
    ),
    "moe-torch": (replace(MOE, format="torch"), "torch", None),
}

#: What is bent in place of each file: the checkpoint that has it.
FILES = {
    "common_state": "dp_reshardable",
    ".metadata": "dp_reshardable",
    "common.pt": "dp_reshardable",
    "model_optim_rng.pt": "torch",
}


def tree(directory: str | Path, root: Path, iteration: int = STEPS) -> Path:
    """A copy of an iteration's directory below a --load directory with a tracker."""
    shutil.copytree(directory, root / f"iter_{iteration:07d}")
    (root / store.TRACKER).write_text(str(iteration))
    return root


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name",
    of_every_version(
        LAYOUTS,
        ["torch", "moe"],
        ["dp_reshardable", "fully_reshardable", "replicated", "fp32-adamw"],
    ),
)
def test_a_real_checkpoint_is_read(name: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    layout, expected_format, sharding = LAYOUTS[name]
    directory, saved = checkpoints.phase_1(layout, 2)
    root = tree(directory, tmp_path / "root")
    found = open_checkpoint(root)
    assert (found.root, found.directory) == (root, root / f"iter_{STEPS:07d}")
    assert (found.iteration, found.release, found.format) == (STEPS, False, expected_format)
    assert found.sharding_type == sharding
    assert [o.step for o in found.optimizers] == [STEPS] * (2 if layout.experts else 1)
    groups = [dict(g) for o in found.optimizers for g in o.groups]
    assert groups == saved[0]["groups"]
    experts = [{g["is_expert_parallel"] for g in o.groups} for o in found.optimizers]
    assert experts == ([{False}, {True}] if layout.experts else [{False}])
    assert found.scheduler["max_lr"] == FIRST.lr
    assert found.scheduler["num_steps"] == STEPS * 8
    assert found.args == ({"iteration": STEPS} if expected_format == "torch_dist" else {})


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["dp_reshardable", "fully_reshardable", "torch"])
def test_tensors_are_those_of_torchs_own_reader(name: str, checkpoints: Checkpoints) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    directory, _ = checkpoints.phase_1(LAYOUTS[name][0], 2)
    found = open_checkpoint(directory)
    if name == "torch":
        assert found.tensors == {}
        return
    entries = FileSystemReader(directory).read_metadata().state_dict_metadata
    shapes = {k: tuple(e.size) if hasattr(e, "size") else None for k, e in entries.items()}
    assert found.tensors == shapes
    assert found.tensors is found.tensors
    # Half of what megatron-core 0.19 writes are the plans of all ranks, which are not read.
    assert b"all_local_plans" in (Path(directory) / ".metadata").read_bytes()
    assert not hasattr(found.store.index, "all_local_plans")
    assert found.tensors["embedding.word_embeddings.weight"] == (64, 16)
    assert found.tensors["common_state/shard_0_1"] is None


@pytest.mark.ranks
@pytest.mark.parametrize("format", ["dp_reshardable", "torch"])
def test_a_checkpoint_without_optimizer_has_none(
    format: str, stock: RankPool, tmp_path: Path
) -> None:
    directory = str(tmp_path / "iter_0000007")
    stock.run(
        "tests.support.stored_cases:without_optimizer",
        1,
        layout=replace(BF16, format=format),
        hyper=FIRST,
        directory=directory,
    )
    found = open_checkpoint(tmp_path, 7)
    assert (found.iteration, found.optimizers, found.sharding_type) == (7, (), None)
    assert found.scheduler is None


@pytest.mark.ranks
def test_tracker_release_iteration_and_bare_directory(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    directory, _ = checkpoints.phase_1(BF16, 2)
    root = tree(directory, tmp_path / "root", 12)
    (root / "iter_0000012").rename(root / "release")
    assert holds_checkpoint(root)
    (root / store.TRACKER).write_text("release\n")
    found = open_checkpoint(str(root))
    assert (found.release, found.iteration, found.directory) == (True, 0, root / "release")
    (root / "release").rename(root / "iter_0000003")
    assert open_checkpoint(root, 3).iteration == 3
    (root / store.TRACKER).unlink()
    assert not holds_checkpoint(root)
    bare = open_checkpoint(root / "iter_0000003")
    assert (bare.iteration, bare.directory) == (STEPS, root / "iter_0000003")


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected a checkpoint directory, found none"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"latest_checkpointed_iteration.* found nothing\. C"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"found model\.safetensors\. Check --load"):
        open_checkpoint(tmp_path)
    directory = tmp_path / "iter_0000002"
    directory.mkdir()
    (directory / ".metadata").touch()
    with pytest.raises(CheckpointError, match=r"torch_dcp or fsdp_dtensor.*--ckpt-format torch_di"):
        open_checkpoint(tmp_path, 2)
    (directory / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(CheckpointError, match=r"expected torch_dist or torch, found.*'zarr'"):
        open_checkpoint(tmp_path, 2)
    (directory / "metadata.json").write_text('{"sharded_back')
    with pytest.raises(CheckpointError, match=r"cannot read .*metadata\.json: JSONDecodeError"):
        open_checkpoint(tmp_path, 2)


@pytest.mark.parametrize("text", ["", "12x", "-3", "²", "\x00\xff", "1_0", "release 5"])
def test_a_damaged_tracker_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / store.TRACKER).write_text(text)
    with pytest.raises(CheckpointError, match=r"latest_checkpointed_iteration.txt: expected an it"):
        open_checkpoint(tmp_path)


@pytest.mark.ranks
def test_a_missing_iteration_names_those_that_are_there(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    root = tree(checkpoints.phase_1(BF16, 2)[0], tmp_path / "root")
    (root / store.TRACKER).write_text("20")
    with pytest.raises(CheckpointError, match=r"iter_0000020 does not exist; found iter_0000004 "):
        open_checkpoint(root)


@pytest.mark.ranks
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named(
    file: str, kept: float, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    directory, _ = checkpoints.phase_1(LAYOUTS[FILES[file]][0], 2)
    path = bend(file, directory, tmp_path, lambda data: data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "bent")
    assert f"cannot read {path}: " in str(caught.value)
    assert "restore it, or load another iteration" in str(caught.value)
    if file == "common_state":
        assert "bytes of common_state/shard_0_1" in str(caught.value)


@pytest.mark.ranks
def test_a_missing_store_is_named(checkpoints: Checkpoints, tmp_path: Path) -> None:
    directory, _ = checkpoints.phase_1(BF16, 2)
    shutil.copytree(directory, tmp_path / "a")
    for path in (tmp_path / "a").glob("*.distcp"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*\.distcp: FileNotFoundError"):
        open_checkpoint(tmp_path / "a")
    (tmp_path / "a" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"expected both, found metadata.json without \.meta"):
        open_checkpoint(tmp_path / "a")
    legacy, _ = checkpoints.phase_1(LAYOUTS["torch"][0], 2)
    root = tree(legacy, tmp_path / "b")
    next(root.rglob("model_optim_rng.pt")).unlink()
    with pytest.raises(CheckpointError, match=r"without model_optim_rng\.pt"):
        open_checkpoint(root)


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.ranks
@pytest.mark.parametrize("file", FILES)
def test_nothing_in_a_checkpoint_runs(file: str, checkpoints: Checkpoints, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    # Fails where a pickle is read by anything that would run it: the payload works.
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists()
    marker.unlink()
    state = {"iteration": 4, "args": Evil(marker), "optimizer": {"param_groups": Evil(marker)}}

    def payload(_: bytes) -> bytes:
        if file == ".metadata":
            return pickle.dumps(Evil(marker))
        target = tmp_path / "payload"
        torch.save([state] if file == "common_state" else state, target)
        return target.read_bytes()

    directory, _ = checkpoints.phase_1(LAYOUTS[FILES[file]][0], 2)
    bend(file, directory, tmp_path, payload)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "bent")
    wanted = "expected torch's Metadata" if file == ".metadata" else "'system' object is not iter"
    assert wanted in str(caught.value)
    assert not marker.exists()


def bend(file: str, directory: str, tmp_path: Path, change: Callable[[bytes], bytes]) -> Path:
    """A copy of a checkpoint with one file's, or the common state's, bytes changed."""
    bent = tmp_path / "bent"
    shutil.copytree(directory, bent)
    if file == "common.pt":
        torch.save({"iteration": 4, "args": Namespace(lr=1.0)}, bent / file)
    if file != "common_state":
        (path,) = bent.rglob(file)
        path.write_bytes(change(path.read_bytes()))
        return path
    with (bent / ".metadata").open("rb") as f:
        metadata = pickle.load(f)
    ((index, info),) = [
        (i, info) for i, info in metadata.storage_data.items() if i.fqn == store.COMMON_KEY
    ]
    data = (bent / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
    path = bent / "bent.distcp"
    changed = change(data)
    path.write_bytes(changed)
    # Where the store is only cut, the index goes on saying how long the object was.
    length = info.length if data.startswith(changed) else len(changed)
    metadata.storage_data[index] = replace(info, relative_path=path.name, offset=0, length=length)
    (bent / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


@pytest.mark.ranks
def test_an_index_that_leads_out_of_the_directory_is_refused(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    bend("common_state", checkpoints.phase_1(BF16, 2)[0], tmp_path, lambda data: data)
    path = tmp_path / "bent" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    for index, info in metadata.storage_data.items():
        metadata.storage_data[index] = replace(info, relative_path=f"../bent/{info.relative_path}")
    path.write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"expected one beside it, found the file \.\./bent/"):
        open_checkpoint(tmp_path / "bent")


@pytest.mark.ranks
def test_optimizers_that_cannot_be_read_name_the_directory(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    directory, _ = checkpoints.phase_1(LAYOUTS["replicated"][0], 2)
    shutil.copytree(directory, tmp_path / "a")
    torch.save(
        {"optimizer": {"param_groups": [{"step": 1}, {"step": 2}]}}, tmp_path / "a" / "common.pt"
    )
    with pytest.raises(CheckpointError, match=r"/a: the checkpoint's param_groups disagree"):
        open_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    ("common", "recorded", "expected"),
    [
        ({"content_metadata": {"distrib_optim_sharding_type": "dp_reshardable"}}, "x", None),
        ({"content_metadata": {"singleton_local_shards": False}}, "from the optimizer", None),
        ({"content_metadata": {}}, None, "none"),
        ({}, "from the optimizer", None),
        ({"args": {"use_distributed_optimizer": True}}, None, "dp_zero_gather_scatter"),
        (
            {"args": {"use_distributed_optimizer": True, "ckpt_fully_parallel_save": True}},
            None,
            "fully_sharded_model_space",
        ),
        ({"args": {"use_distributed_optimizer": False}}, None, "none"),
    ],
)
def test_the_sharding_type_is_derived_as_megatron_does(
    common: dict[str, Any], recorded: str | None, expected: str | None
) -> None:
    named = common.get("content_metadata", {}).get("distrib_optim_sharding_type")
    if "args" in common:
        common = {"args": SimpleNamespace(**common["args"])}
    found = stored._sharding_type(common, recorded)
    assert found == {None: named or recorded, "none": None}.get(expected, expected)


def test_reading_imports_neither_megatron_nor_the_checkpointing_of_torch() -> None:
    code = (
        "import sys, megatron_ext.checkpoint.store; print([m for m in sys.modules if "
        "m.startswith(('megatron.', 'torch.distributed.checkpoint'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
