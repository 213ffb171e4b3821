"""What a load reads from a torch_dist checkpoint, and that it leaves no memory as it was."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from . import harness, policies
from .harness import Hyper, Layout
from .unsharded import gather


@dataclass
class Reads:
    """Bytes that this rank has read.

    Args:
        payload: Elements times bytes an element, of tensors.
        stored: What the checkpoint's files spend on them.
        metadata: How often ``.metadata`` was unpickled.
    """

    payload: int = 0
    stored: int = 0
    metadata: int = 0


@contextlib.contextmanager
def counted() -> Iterator[Reads]:
    """Count what a load asks of the files (torch/distributed/checkpoint/default_planner.py)."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.planner import LoadItemType

    reads, original = Reads(), DefaultLoadPlanner.finish_plan
    read_metadata = FileSystemReader.read_metadata

    def unpickled(self: Any, *args: Any, **kwargs: Any) -> Any:
        reads.metadata += 1
        return read_metadata(self, *args, **kwargs)

    def finish_plan(self: Any, plan: Any) -> Any:
        for item in plan.items:
            if item.type == LoadItemType.TENSOR:
                entry = self.metadata.state_dict_metadata[item.storage_index.fqn]
                reads.payload += math.prod(item.lengths) * entry.properties.dtype.itemsize
                reads.stored += self.metadata.storage_data[item.storage_index].length
        return original(self, plan)

    DefaultLoadPlanner.finish_plan = finish_plan  # type: ignore[method-assign]
    FileSystemReader.read_metadata = unpickled  # type: ignore[method-assign]
    try:
        yield reads
    finally:
        DefaultLoadPlanner.finish_plan = original  # type: ignore[method-assign]
        FileSystemReader.read_metadata = read_metadata  # type: ignore[method-assign]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Let new memory hold NaN instead of anything."""
    original = torch.empty

    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

    torch.empty = empty  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = original


def resumed(
    layout: Layout,
    hyper: Hyper,
    directory: str,
    policy: str | None,
    save_to: str | None = None,
) -> dict[str, Any]:
    """Load with a policy, or with stock (None), from memory that is NaN; bytes of all ranks."""
    run = harness.build(layout, hyper) if policy is None else policies.build(layout, hyper, policy)
    with poisoned(), counted() as reads:
        harness.load(run, directory)
    loaded = gather(run)
    if save_to is not None:
        harness.save(run, save_to)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (reads.payload, reads.stored))
    payload, stored = map(sum, zip(*everyone, strict=True))
    report = None if policy is None else policies._report(run)
    return {
        "state": loaded,
        "payload": payload,
        "stored": stored,
        "metadata": reads.metadata,
        "report": None if report is None else report.to_json(),
        "lines": [] if report is None else report.lines(),
    }


def strictness() -> dict[str | None, bool]:
    """For each value of --dist-ckpt-strictness whether all has to be asked for."""
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from megatron_ext.hooks import sharded

    named: dict[str | None, Any] = {s.value: {"strict": s.value} for s in StrictHandling}
    return {name: sharded._strict(call) for name, call in {None: {}, **named}.items()}


def planned_otherwise(layout: Layout, hyper: Hyper, directory: str, policy: str) -> str:
    """The error where a moment was not read that the plan keeps."""
    from megatron_ext.resume import members

    run = policies.build(layout, hyper, policy)
    (member,) = members.members_of(run.optimizer)
    original = member.load_state_dict

    def load_state_dict(state_dict: Any) -> None:
        unread = frozenset(["decoder.layers.0.mlp.linear_fc1.weight"])
        member.resume.load.unread = {"exp_avg": unread}
        original(state_dict)

    member.load_state_dict = load_state_dict
    try:
        harness.load(run, directory)
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""
