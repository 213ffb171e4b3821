"""CPU offload by stock Megatron: phase 1, and changes that are made by hand."""

from __future__ import annotations

from typing import Any

import torch

from . import harness
from .harness import Hyper, Layout

HYPER = Hyper()
MORE = 3


def phase_1(layout: Layout, directory: str) -> dict[str, Any]:
    """Save after three steps, and go on in the same process."""
    run = harness.build(layout, HYPER)
    harness.train(run, 3)
    harness.save(run, directory)
    harness.train(run, MORE)
    return state_of(run)


def changed_by_hand(layout: Layout, directory: str, factors: tuple[float, float]) -> dict[str, Any]:
    """The state after stock's load and a loop over the moments, as RL frameworks have it."""
    run = harness.build(layout, HYPER)
    harness.load(run, directory)
    for inner in harness.inner_optimizers(run.optimizer):
        for state in inner.state.values():
            for key, factor in zip(("exp_avg", "exp_avg_sq"), factors, strict=True):
                state[key].mul_(factor) if factor else state[key].zero_()
    changed = state_of(run)
    harness.train(run, MORE)
    return {"loaded": changed, "trained": state_of(run), "steps": steps_of(run)}


def state_of(run: harness.Run) -> dict[str, Any]:
    """Moments and master weights of each parameter on this rank, and where they lie."""
    found = []
    for inner in harness.inner_optimizers(run.optimizer):
        for group in inner.param_groups:
            for param in group["params"]:
                state = inner.state[param]
                keys = ("exp_avg", "exp_avg_sq", "master_param")
                found.append({key: state[key].detach().clone().numpy() for key in keys})
    return {"shards": found, "weights": [_bytes(p) for c in run.model for p in c.parameters()]}


def _bytes(weight: torch.Tensor) -> bytes:
    return weight.detach().float().numpy().tobytes()


def steps_of(run: harness.Run) -> dict[str, list[int]]:
    """The steps of the inner optimizers on the CPU and on the device."""
    (inner,) = harness.inner_optimizers(run.optimizer)
    on_cpu = {int(s["step"]) for o in inner.cpu_optimizers for s in o.state.values()}
    on_device = {int(g["step"]) for g in inner.gpu_optimizer.param_groups}
    return {"cpu": sorted(on_cpu), "device": sorted(on_device)}
