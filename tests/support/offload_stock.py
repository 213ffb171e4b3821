"""CPU offload by stock Megatron: phase 1, and changes that are made by hand."""

from __future__ import annotations

from typing import Any

import torch

from . import harness
from .harness import Hyper, Layout

#: Without a warm-up the learning rate is not 0 at a load.
HYPER = Hyper(warmup_iters=0)
MORE = 3


def phase_1(layout: Layout, directory: str) -> dict[str, Any]:
    """Save after three steps, and go on in the same process."""
    run = harness.build(layout, HYPER)
    harness.train(run, 3)
    harness.save(run, directory)
    saved = state_of(run)
    harness.train(run, MORE)
    return {"saved": saved, "trained": state_of(run), "losses": run.losses}


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
    return {
        "loaded": changed,
        "trained": state_of(run),
        "steps": steps_of(run),
        "losses": run.losses,
    }


def state_of(run: harness.Run) -> dict[str, Any]:
    """What this rank trains: moments and master weights of its inner optimizers, and the weights.

    ``same`` tells whether HybridDeviceOptimizer, whose state is saved, has the same.
    """
    found, same = [], True
    (inner,) = harness.inner_optimizers(run.optimizer)
    for group in inner.param_groups:
        for param in group["params"]:
            own = inner.param_to_inner_param[param]
            (state,) = (one.state[own] for one in inner.sub_optimizers if own in one.state)
            trained = {"master_param": own, **{k: state[k] for k in ("exp_avg", "exp_avg_sq")}}
            same &= all(bool((inner.state[param][k] == v).all()) for k, v in trained.items())
            found.append({k: v.detach().clone().numpy() for k, v in trained.items()})
    weights = [_bytes(p) for c in run.model for p in c.parameters()]
    return {"shards": found, "weights": weights, "same": same}


def _bytes(weight: torch.Tensor) -> bytes:
    return weight.detach().float().numpy().tobytes()


def steps_of(run: harness.Run) -> dict[str, list[int]]:
    """The steps of the inner optimizers on the CPU and on the device."""
    (inner,) = harness.inner_optimizers(run.optimizer)
    on_cpu = {int(s["step"]) for o in inner.cpu_optimizers for s in o.state.values()}
    on_device = {int(g["step"]) for g in inner.gpu_optimizer.param_groups}
    return {"cpu": sorted(on_cpu), "device": sorted(on_device)}
