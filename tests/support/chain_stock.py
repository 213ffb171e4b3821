"""A chain of phases in one process that never stops: stock Megatron, corrected by hand."""

from __future__ import annotations

from typing import Any

import torch

from . import chain, harness
from .harness import Layout
from .oracle import _edit


def by_hand(layout: Layout, count: int, steps: int) -> list[dict[str, Any]]:
    """The losses of each phase and the state at its end."""
    found = []
    run = None
    for phase in chain.phases(count):
        if run is None:
            run = harness.build(layout, phase.hyper)
        else:
            _change(run, phase)
        run.losses = []
        harness.train(run, steps)
        found.append({"losses": run.losses, "state": harness.snapshot(run)})
    return found


@torch.no_grad()
def _change(run: harness.Run, phase: chain.Phase) -> None:
    first, second = chain.FACTORS[phase.moments]
    for inner in harness.inner_optimizers(run.optimizer):
        for group in inner.param_groups:
            _edit(group, run.hyper, phase.hyper)
            if phase.moments == "preset: reset":
                group["step"] = 0
        for state in inner.state.values():
            state["exp_avg"] *= first
            state["exp_avg_sq"] *= second
    run.scheduler = harness.scheduler_for(run, phase.hyper)
    run.hyper = phase.hyper
