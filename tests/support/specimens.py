"""Small checkpoints of every form, with every file that Megatron writes, to be damaged."""

from __future__ import annotations

import argparse
import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from . import checkpoints, inspected

#: Form -> what it is.
FORMS = {
    "common.pt": "torch_dist up to megatron-core 0.18",
    "common_state": "torch_dist from 0.19 on",
    "torch": "legacy torch, two ranks",
}
ITERATION = "iter_0000010"
#: The file of the store with the common state.
STATE_FILE = "__0_1.distcp"
#: The file of the store with tensors.
TENSOR_FILE = "__0_0.distcp"


def specimen(form: str, root: Path) -> Path:
    """A directory for ``--load`` with one iteration; returns the iteration's own."""
    directory = root / ITERATION
    if form == "torch":
        checkpoints.checkpoint(root, 10, changes={"save": None})
        shutil.copytree(directory / "mp_rank_00", directory / "mp_rank_01")
        return directory
    tensors = {f"optimizer.state.{k}.w": torch.ones(8, 64) for k in ("exp_avg", "exp_avg_sq")}
    common = {
        "iteration": 10,
        "args": argparse.Namespace(seed=1),
        "opt_param_scheduler": {"num_steps": 80, "max_lr": 3e-3},
    }
    inspected.store(directory, tensors, common=common)
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    if form == "common_state":
        state = torch.load(directory / "common.pt", weights_only=False)
        (directory / "common.pt").unlink()
        place_common_state(directory, state)
    return directory


def place_common_state(directory: Path, state: Any) -> None:
    """Put the common state into the store, as 0.19 does, or another one in its place."""
    buffer = io.BytesIO()
    torch.save([state], buffer)
    (directory / STATE_FILE).write_bytes(buffer.getvalue())
    key = "common_state/shard_0_1"
    index = pickle.loads((directory / ".metadata").read_bytes())
    index.state_dict_metadata[key] = BytesStorageMetadata()
    size = len(buffer.getvalue())
    index.storage_data[MetadataIndex(key)] = _StorageInfo(STATE_FILE, 0, size)
    (directory / ".metadata").write_bytes(pickle.dumps(index))


def state_of(form: str, directory: Path) -> Any:
    """The training state of the first rank, loaded by torch."""
    if form == "common.pt":
        return torch.load(directory / form, weights_only=False)
    if form == "torch":
        return torch.load(directory / "mp_rank_00" / "model_optim_rng.pt", weights_only=False)
    (state,) = torch.load(directory / STATE_FILE, weights_only=False)
    return state


def write_state(form: str, directory: Path, state: Any) -> None:
    """Put another training state in its place."""
    if form == "common_state":
        place_common_state(directory, state)
    else:
        name = form if form == "common.pt" else "mp_rank_00/model_optim_rng.pt"
        torch.save(state, directory / name)


def commands(root: Path, other: Path, out: Path) -> dict[str, list[str]]:
    """Every command that reads a checkpoint, on this one; `other` is a whole one of its form."""
    return {
        "inspect": ["inspect", str(root)],
        "inspect --json": ["inspect", str(root), "--json"],
        "inspect --moments": ["inspect", str(root), "--moments"],
        "diff a": ["diff", str(root), str(other)],
        "diff b": ["diff", str(other), str(root)],
        "diff --moments": ["diff", str(other), str(root), "--moments"],
        "edit": ["edit", str(root), "--out", str(out), "--set", "max_lr=1e-3"],
    }
