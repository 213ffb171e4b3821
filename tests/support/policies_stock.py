"""The unsharded state that stock Megatron loads; runs where this package cannot be imported."""

from __future__ import annotations

from collections.abc import Sequence
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


def damaged(
    layout: Layout,
    hyper: Hyper,
    directory: str,
    target: str,
    changes: Sequence[tuple[str, int, int, float]] = (
        ("exp_avg", 0, 3, float("nan")),
        ("exp_avg_sq", 1, 0, float("inf")),
    ),
) -> None:
    """The checkpoint once more, with other numbers among rank 0's moments.

    A change is the moment, the position of a parameter that rank 0 holds, the element and its
    number.
    """
    run = harness.build(layout, hyper)
    harness.load(run, directory)
    if dist.get_rank() == 0:
        (inner,) = harness.inner_optimizers(run.optimizer)
        states = [inner.state[p] for g in inner.param_groups for p in g["params"]]
        for key, position, element, value in changes:
            states[position][key].view(-1)[element] = value
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
    return {
        "state": gather(run),
        "momenta": muon.state_beside_adam(run.optimizer),
        "steps": harness.snapshot(run)["steps"],
    }
