"""Edited checkpoints by stock Megatron, and what a resume from them has to give.

This file does not import megatron_ext, and the processes it runs in cannot.
"""

from __future__ import annotations

from typing import Any

import torch

from . import harness
from .harness import Hyper, Layout


def edited(layout: Layout, hyper: Hyper, steps: int, directory: str) -> dict[str, Any]:
    """Train, change the model's weights but not the master weights, save."""
    run = harness.build(layout, hyper)
    harness.train(run, steps)
    with torch.no_grad():
        for chunk in run.model:
            for name, parameter in chunk.named_parameters():
                if "mlp" in name:
                    parameter.mul_(0.75)
    harness.save(run, directory)
    return harness.snapshot(run)


def corrected(layout: Layout, hyper: Hyper, directory: str, more: int) -> dict[str, Any]:
    """Load with stock Megatron, make its master weights from the model's, train."""
    run = harness.build(layout, hyper)
    harness.load(run, directory)
    run.optimizer.reload_model_params()
    loaded = harness.snapshot(run)
    harness.train(run, more)
    return {"losses": run.losses, "lrs": run.lrs, "loaded": loaded, "final": harness.snapshot(run)}
