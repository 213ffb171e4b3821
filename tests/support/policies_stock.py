"""The unsharded state that stock Megatron loads; runs where this package cannot be imported."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from . import harness, muon
from .harness import Hyper, Layout
from .unsharded import State, gather


def state(layout: Layout, hyper: Hyper, directory: str) -> State:
    """After a load with phase 1's arguments."""
    run = harness.build(layout, hyper)
    harness.load(run, directory)
    return gather(run)


def damaged(layout: Layout, hyper: Hyper, directory: str, target: str) -> None:
    """The checkpoint once more, with a NaN and an infinite number among rank 0's moments."""
    run = harness.build(layout, hyper)
    harness.load(run, directory)
    if dist.get_rank() == 0:
        (inner,) = harness.inner_optimizers(run.optimizer)
        states = [inner.state[p] for g in inner.param_groups for p in g["params"]]
        states[0]["exp_avg"].view(-1)[3] = float("nan")
        states[1]["exp_avg_sq"].view(-1)[0] = float("inf")
    harness.save(run, target)


def trained(layout: Layout, hyper: Hyper, directory: str, steps: int) -> dict[str, Any]:
    """Load and train with stock Megatron."""
    run = harness.build(layout, hyper)
    harness.load(run, directory)
    harness.train(run, steps)
    return {"state": gather(run), "losses": run.losses}


def with_muon(layout: Layout, hyper: Hyper, directory: str) -> dict[str, Any]:
    """What stock loads of a chain of Muon and Adam."""
    run = harness.build(layout, hyper)
    harness.load(run, directory)
    return {"state": gather(run), "momenta": muon.momenta(run.optimizer)}
