"""Checkpoints without a Megatron, for the tests of inspect and diff."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from .groups import group
from .unsharded import State

Cut = list[tuple[slice, ...]]


def store(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    cuts: Mapping[str, Cut] | None = None,
    common: Mapping[str, Any] | None = None,
    payload: Callable[[torch.Tensor], bytes] | None = None,
) -> Path:
    """A torch_dist checkpoint of these tensors, each cut as asked; whole by default."""
    directory.mkdir(parents=True)
    entries, places = {}, {}
    with (directory / "__0_0.distcp").open("wb") as file:
        for key, tensor in tensors.items():
            chunks = []
            for cut in (cuts or {}).get(key, [tuple(slice(0, n) for n in tensor.shape)]):
                part = tensor[cut].clone(memory_format=torch.preserve_format)
                offset = torch.Size(s.start for s in cut)
                data = (payload or saved)(part)
                places[MetadataIndex(key, offset)] = _StorageInfo(
                    "__0_0.distcp", file.tell(), len(data)
                )
                chunks.append(ChunkStorageMetadata(offset, part.shape))
                file.write(data)
            entries[key] = TensorStorageMetadata(
                TensorProperties(dtype=tensor.dtype), tensor.shape, chunks
            )
    finish(directory, Metadata(entries, storage_data=places), common)
    return directory


def saved(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def finish(directory: Path, index: Metadata, common: Mapping[str, Any] | None = None) -> None:
    """What is beside the ``.distcp`` files."""
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    text = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    (directory / "metadata.json").write_text(text)
    state = {
        "iteration": 5,
        "optimizer": {
            "optimizer": {"param_groups": [group(step=5)]},
            "param_state_sharding_type": "fully_reshardable",
        },
    }
    torch.save({**state, **(common or {})}, directory / "common.pt")


def stacked(state: State) -> dict[tuple[str, str], np.ndarray]:
    """(state key, name in a checkpoint) -> values, layers and experts one above the other.

    The names in a checkpoint are those of TransformerEngine's fused modules, without numbers.
    """
    return {
        (moment, stacked): np.stack([state[name][moment].astype(np.float64) for name in names])
        for stacked, names in stacked_names(state).items()
        for moment in state[names[0]]
    }


def stacked_names(state: State) -> dict[str, list[str]]:
    """Name in a checkpoint -> the parameters that are one above the other there."""
    renamed = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        "local_experts.": "experts.",
    }
    names: dict[str, list[str]] = {}
    for name in state:
        key = ".".join(w for w in name.split(".") if not w.isdigit())
        for old, new in renamed.items():
            key = key.replace(old, new)
        names.setdefault(key, []).append(name)
    return names


def poison(directory: Path, key: str, value: float, at: int = 0) -> None:
    """Overwrite one float32 of a tensor's first piece, in its file."""
    index = pickle.loads((directory / ".metadata").read_bytes())
    info = next(i for place, i in index.storage_data.items() if place.fqn == key)
    path = directory / info.relative_path
    data = bytearray(path.read_bytes())
    item = bytes(data[info.offset : info.offset + info.length])
    values = torch.load(io.BytesIO(item), weights_only=True).numpy().tobytes()
    begin = info.offset + item.index(values) + 4 * at
    data[begin : begin + 4] = np.float32(value).tobytes()
    path.write_bytes(data)
