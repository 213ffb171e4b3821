"""The state that a changed model has to have, put into stock Megatron by hand.

This file does not import megatron_ext, and the processes it runs in cannot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from . import harness, unsharded
from .harness import GLOBAL_BATCH, Hyper, Layout


def result(run: harness.Run) -> dict[str, Any]:
    """The unsharded optimizer state and weights."""
    return {"state": unsharded.gather(run), "weights": unsharded.weights(run)}


def phase_1(layout: Layout, hyper: Hyper, steps: int, directory: str | None) -> dict[str, Any]:
    """Train and save; what was saved. Frozen weights are not those of a new model."""
    run = harness.build(layout, hyper)
    with torch.no_grad():
        for chunk in run.model:
            for parameter in chunk.parameters():
                if not parameter.requires_grad:
                    parameter.mul_(1.25)
    harness.train(run, steps)
    if directory is not None:
        harness.save(run, directory)
    return result(run)


def fresh(layout: Layout, hyper: Hyper) -> dict[str, np.ndarray]:
    """The weights that a model is initialised with."""
    return unsharded.weights(harness.build(layout, hyper))


def loaded(layout: Layout, hyper: Hyper, directory: str) -> dict[str, Any]:
    """What stock Megatron loads."""
    run = harness.build(layout, hyper)
    harness.load(run, directory)
    return result(run)


def trained(
    layout: Layout,
    hyper: Hyper,
    state: dict[str, dict[str, np.ndarray]],
    weights: dict[str, np.ndarray],
    steps: int,
    more: int,
) -> dict[str, Any]:
    """Write a state into every shard, as if `steps` steps had been made, and train."""
    run = harness.build(layout, hyper)
    harness.train(run, 1)  # which allocates the optimizer's state
    _write(run, state, weights)
    for inner in harness.inner_optimizers(run.optimizer):
        for group in inner.param_groups:
            if "step" in group:
                group["step"] = steps
            for param in group["params"]:
                if "step" in inner.state[param]:
                    inner.state[param]["step"].fill_(steps)
    run.scheduler.num_steps, run.iteration, run.losses = 0, steps, []
    run.scheduler.step(increment=steps * GLOBAL_BATCH)
    harness.train(run, more)
    return {**result(run), "losses": run.losses}


def _write(
    run: harness.Run, state: dict[str, dict[str, np.ndarray]], weights: dict[str, np.ndarray]
) -> None:
    from megatron.core import parallel_state

    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    places = {}
    with torch.no_grad():
        for chunk in run.model:
            for name, param in unsharded._named(chunk):
                split = 1 if ".experts." in name else size
                gated = unsharded._gated(run, name)
                _, where = unsharded._cut(name, tuple(param.shape), split, rank, gated)
                places[id(param)] = name, where.reshape(-1)
                value = torch.from_numpy(weights[name].reshape(-1)[where.reshape(-1)])
                param.data.view(-1).copy_(value)
        for optimizer in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
            for model_param, main, begin, end in unsharded._held(optimizer):
                name, where = places[id(model_param)]
                held = optimizer.optimizer.state[main]
                for key, target in {"param": main, **held}.items():
                    if key in unsharded.KEYS:
                        value = torch.from_numpy(state[name][key].reshape(-1)[where[begin:end]])
                        target.data.view(-1).copy_(value)
