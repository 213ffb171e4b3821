"""Checkpoints of a mixture of experts as their metadata describes them, without an element.

The index is made as Megatron makes it: a plan for each rank, from which torch makes the metadata
(`create_default_global_save_plan`). megatron-core 0.19.2 keeps the plans in it
(``all_local_plans``, core/dist_checkpointing/strategies/state_dict_saver.py:144).
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from benchmarks.moe import Experts

STATES = ("param", "exp_avg", "exp_avg_sq")
Sharding = Literal["fully_reshardable", "dp_reshardable"]

#: Bytes of an item in a file; files are sparse.
_ITEM = 4096


@dataclass(frozen=True)
class Moe(Experts):
    """Experts alone: the rest of the model is left out; each rank has a file.

    Args:
        cuts: In how many pieces a parameter of its own key is stored.
    """

    expert_ffn: int = 2176
    cuts: int = 4

    @property
    def elements(self) -> int:
        """Of the whole model."""
        return self.expert_elements

    @property
    def data_parallel(self) -> int:
        """Ranks that share an expert-parallel rank's experts of a pipeline stage."""
        return self.ranks // (self.pipeline * self.expert)


@dataclass
class Writer:
    """Plans of all ranks, and where their items come to lie.

    Args:
        ranks: How many there are.
        plans: Rank -> its items.
        places: Where each item lies.
        ends: Rank -> bytes of its file.
        objects: Rank -> offset and bytes of its objects.
    """

    ranks: int
    plans: dict[int, list[WriteItem]] = field(default_factory=dict)
    places: dict[MetadataIndex, _StorageInfo] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    objects: dict[int, list[tuple[int, bytes]]] = field(default_factory=dict)

    def tensor(
        self, rank: int, key: str, number: int, offset: Any, size: Any, whole: torch.Size
    ) -> None:
        """A piece of a float32 tensor."""
        # No two ranks share an object, for each sends its own.
        chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(size))
        properties = TensorProperties(dtype=torch.float32)
        data = TensorWriteData(chunk, properties, torch.Size(whole))
        item = WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
        place = MetadataIndex(key[:1] + key[1:], torch.Size(offset), number)
        self._add(rank, item, place, _ITEM)

    def object(self, rank: int, key: str, value: Any) -> None:
        """A ShardedObject."""
        buffer = io.BytesIO()
        torch.save([value], buffer)
        data = buffer.getvalue()
        self.objects.setdefault(rank, []).append((self.ends.get(rank, 0), data))
        index = MetadataIndex(key)
        write = BytesIOWriteData(nbytes=len(data))
        item = WriteItem(index, WriteItemType.BYTE_IO, bytes_io_data=write)
        self._add(rank, item, index, len(data))

    def _add(self, rank: int, item: WriteItem, index: MetadataIndex, length: int) -> None:
        self.plans.setdefault(rank, []).append(item)
        begin = self.ends.get(rank, 0)
        self.ends[rank] = begin + length
        self.places[index] = _StorageInfo(f"__{rank}_0.distcp", begin, length)

    @functools.cached_property
    def _planned(self) -> tuple[list[SavePlan], Any]:
        plans = [SavePlan(self.plans.get(rank, [])) for rank in range(self.ranks)]
        return plans, create_default_global_save_plan(plans)[1].state_dict_metadata

    def write(self, directory: Path, with_plans: bool) -> None:
        """Write an iteration's directory; may be called more than once.

        Args:
            directory: A new one.
            with_plans: Whether the index keeps the plans, as 0.19.2 does.
        """
        directory.mkdir(parents=True)
        text = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        (directory / "metadata.json").write_text(text)
        plans, entries = self._planned
        metadata = Metadata(entries, version="1.0.0")
        if with_plans:
            metadata.all_local_plans = plans  # type: ignore[attr-defined]
        metadata.storage_data = self.places
        metadata.storage_meta = StorageMeta(checkpoint_id=str(directory), save_id="0")
        for rank, end in self.ends.items():
            with (directory / f"__{rank}_0.distcp").open("wb") as file:
                file.truncate(end)
                for begin, data in self.objects.get(rank, ()):
                    file.seek(begin)
                    file.write(data)
        with (directory / ".metadata").open("wb") as file:
            pickle.dump(metadata, file, protocol=4)


def planned(moe: Moe, sharding: Sharding) -> Writer:
    """What megatron-core 0.19.2 would write, tensors aside.

    Args:
        moe: The model.
        sharding: How the optimizer's state is cut.
    """
    writer = Writer(moe.ranks)
    by_parameter = sharding == "fully_reshardable"
    for rank, *item in _by_parameters(moe) if by_parameter else _by_buckets(moe):
        writer.tensor(rank, *item)
    groups = {"param_groups": [_group()]}
    section: dict[str, Any] = {"optimizer": groups, "param_state_sharding_type": sharding}
    if not by_parameter:
        section = {"param_state_sharding_type": sharding}
        for number in range(moe.pipeline * moe.expert):
            prefix = f"optimizer.distributed.dp_group_idx_{number}"
            rank = number * moe.data_parallel
            writer.object(rank, f"{prefix}.optimizer/shard_0_1", groups)
            writer.object(rank, f"{prefix}.per_bucket_numel/shard_0_1", {})
            writer.object(rank, f"{prefix}.per_bucket_numel_unpadded/shard_0_1", {})
    common = {
        "iteration": 10,
        "args": argparse.Namespace(num_layers=moe.layers, num_experts=moe.experts),
        "optimizer": section,
        "opt_param_scheduler": {"num_steps": 80, "max_lr": 3e-3},
        "content_metadata": {"distrib_optim_sharding_type": sharding},
    }
    writer.object(0, "common_state/shard_0_1", common)
    return writer


def counts(moe: Moe, sharding: Sharding) -> tuple[int, int, int, int]:
    """Tensors, pieces, elements and bytes of one state, by the closed form."""
    tensors = moe.layers * moe.experts * 2 if sharding == "fully_reshardable" else 0
    if tensors:
        return tensors, tensors * moe.cuts, moe.elements, 4 * moe.elements
    buckets = moe.pipeline * moe.expert
    pieces = buckets * len(_cuts(moe))
    return buckets, pieces, moe.elements, 4 * moe.elements


def _by_parameters(moe: Moe) -> Iterator[tuple[Any, ...]]:
    ranks = itertools.cycle(range(moe.ranks))
    for layer, expert, (name, shape) in itertools.product(
        range(moe.layers), range(moe.experts), moe.shapes.items()
    ):
        inside = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}.{name}.weight"
        rows = shape[0] // moe.cuts
        for state in STATES:
            whole = torch.Size(shape)
            for number in range(moe.cuts):
                key, size = f"optimizer.state.{state}.{inside}", (rows, shape[1])
                yield next(ranks), key, number, (number * rows, 0), size, whole


def _by_buckets(moe: Moe) -> Iterator[tuple[Any, ...]]:
    cuts = _cuts(moe)
    whole = torch.Size((cuts[-1][1],))
    shard = cuts[-1][1] // moe.data_parallel
    for group in range(moe.pipeline * moe.expert):
        prefix = f"optimizer.distributed.dp_group_idx_{group}.gbuf_idx_0"
        bucket = f"{prefix}.dtype_(torch.bfloat16, torch.float32).bucket_idx_0"
        for number, (begin, end) in enumerate(cuts):
            rank = group * moe.data_parallel + begin // shard
            for state in STATES:
                yield rank, f"{bucket}.{state}", number, (begin,), (end - begin,), whole


def _cuts(moe: Moe) -> list[tuple[int, int]]:
    """Where a bucket is cut: at parameters, and at the shards of the data-parallel ranks."""
    one = [rows * columns for rows, columns in moe.shapes.values()]
    local = moe.layers // moe.pipeline * (moe.experts // moe.expert)
    ends = list(itertools.accumulate(one * local))
    shard, rest = divmod(ends[-1], moe.data_parallel)
    assert not rest
    at = sorted({0, *ends, *range(shard, ends[-1], shard)})
    return list(itertools.pairwise(at))


def _group() -> dict[str, Any]:
    return {
        "step": 10,
        "wd_mult": 1.0,
        "lr_mult": 1.0,
        "is_expert_parallel": True,
        "is_decoupled_lr": False,
        "max_lr": 3e-3,
        "min_lr": 3e-4,
        "lr": 2e-3,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
