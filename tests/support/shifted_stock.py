"""Checkpoints whose state stock Megatron stores shifted, and what the run had.

This file does not import megatron_ext, and the processes it runs in cannot.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import numpy as np
import torch.distributed as dist

from . import harness, mapped_stock, unsharded
from .harness import Hyper, Layout


def phase_1(
    layout: Layout,
    hyper: Hyper,
    steps: int,
    directory: str,
    args: dict[str, Any],
    parallel_save: bool = False,
) -> dict[str, Any]:
    """Train and save; the state and the weights of the run, and which elements were not stored.

    Args:
        layout: The run's layout.
        hyper: Its hyperparameters.
        steps: Number of steps.
        directory: Where to save.
        args: The saved arguments of the run.
        parallel_save: Whether data-parallel ranks share the work, as --ckpt-fully-parallel-save.
    """
    run = harness.build(layout, hyper)
    harness.train(run, steps)
    saved = argparse.Namespace(iteration=run.iteration, **args)
    if parallel_save:
        _save_parallel(run, directory, saved)
    else:
        harness.save(run, directory, args=saved)
    result = mapped_stock.result(run)
    buffers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(buffers, _buffers(run))
    shapes = {name: state["param"].shape for name, state in result["state"].items()}
    return {**result, "lost": _lost(buffers, shapes, layout.tied)}


def _save_parallel(run: harness.Run, directory: str, args: argparse.Namespace) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    strategy = FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), group)
    original = dist_checkpointing.save
    dist_checkpointing.save = functools.partial(original, sharded_strategy=strategy)
    try:
        harness.save(run, directory, args=args)
    finally:
        dist_checkpointing.save = original


#: Name, elements in the unsharded parameter, begin and end in the buffer, and padding before.
_Entry = tuple[str, np.ndarray, int, int, int]


def _buffers(run: harness.Run) -> list[list[_Entry]]:
    """Each buffer of this rank."""
    from megatron.core import parallel_state

    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    names = {id(p): name for chunk in run.model for name, p in unsharded._named(chunk)}
    out = []
    for optimizer in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        for buffer in optimizer.buffers:
            padding = [0]
            for bucket in buffer.buckets:
                padding.append(padding[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
            entries = []
            for param, (begin, end, bucket) in buffer.param_index_map.items():
                name = names[id(param)]
                split = 1 if ".experts." in name else size
                gated = unsharded._gated(run, name)
                _, where = unsharded._cut(name, tuple(param.shape), split, rank, gated)
                entries.append((name, where.reshape(-1), begin, end, padding[bucket]))
            out.append(entries)
    return out


def _lost(
    buffers: list[list[list[_Entry]]], shapes: dict[str, tuple[int, ...]], tied: bool
) -> dict[str, np.ndarray]:
    """Global name -> which elements no rank has stored, from the buffers of the run itself.

    Of equal pieces the first rank stores its own. The last stage's copy of a tied embedding is
    stored by the first stage.
    """
    lost = {name: np.zeros(shape, bool) for name, shape in shapes.items()}
    done = set()
    for of_rank in buffers:
        for buffer in of_rank:
            stored = [e for e in buffer if (e[0], e[1].tobytes()) not in done]
            stored = [e for e in stored if not (tied and e[0] == "output_layer.weight")]
            done |= {(e[0], e[1].tobytes()) for e in stored}
            known: set[int] = set()
            for _, _, begin, end, _ in stored:
                known |= set(range(begin, end))
            # The gathered buffer is shorter than the buffer by all padding.
            length = max(end - padding for _, _, _, end, padding in buffer)
            known &= set(range(length))
            for name, where, begin, end, padding in stored:
                there = [at not in known for at in range(begin - padding, end - padding)]
                lost[name].reshape(-1)[where] = there
    return lost


def groups(cases: list[tuple[int, dict[str, int], str, str]]) -> list[list[list[int]]]:
    """Ranks with equal parameters, as Megatron has them.

    Args:
        cases: Number of ranks; tp, ep, pp and cp; the order of the dimensions; in which of them
            these ranks differ.
    """
    from megatron.core.parallel_state import RankGenerator

    out = []
    for world, sizes, order, what in cases:
        data = world // (sizes["tp"] * sizes["ep"] * sizes["pp"] * sizes["cp"])
        out.append(RankGenerator(dp=data, order=order, **sizes).get_ranks(what))
    return out
