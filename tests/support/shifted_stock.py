"""Checkpoints whose state stock Megatron stores shifted, and what the run had.

This file does not import megatron_ext, and the processes it runs in cannot.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from . import harness, mapped_stock, unsharded
from .harness import Hyper, Layout


def phase_1(layout: Layout, hyper: Hyper, steps: int, directory: str) -> dict[str, Any]:
    """Train and save; the state of the run, and where its buffers have the parameters."""
    run = harness.build(layout, hyper)
    harness.train(run, steps)
    harness.save(run, directory)
    buffers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(buffers, _buffers(run))
    return {**mapped_stock.result(run), "buffers": buffers}


def _buffers(run: harness.Run) -> list[list[tuple[str, int, int, int]]]:
    """Of each buffer of this rank each parameter: name, begin, end, elements of padding before."""
    names = {id(p): name for chunk in run.model for name, p in unsharded._named(chunk)}
    out = []
    for optimizer in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        for buffer in optimizer.buffers:
            padding = [0]
            for bucket in buffer.buckets:
                padding.append(padding[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
            out.append(
                [
                    (names[id(param)], begin, end, padding[bucket])
                    for param, (begin, end, bucket) in buffer.param_index_map.items()
                ]
            )
    return out
