"""Checkpoints by stock Megatron; runs where this package cannot be imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import harness
from .harness import Hyper, Layout


def without_optimizer(layout: Layout, hyper: Hyper, directory: str) -> None:
    """What --no-save-optim leaves of a checkpoint (training/checkpointing.py:1335, 0.19.2)."""
    from megatron.core import dist_checkpointing

    run = harness.build(layout, hyper)
    state: dict[str, Any] = {"iteration": 7}
    if layout.format == "torch":
        path = Path(directory) / "mp_rank_00" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        state["model"] = harness.unwrapped(run.model[0]).state_dict_for_save_checkpoint()
        torch.save(state, path)
        return
    metadata = harness._metadata(layout)
    state |= harness._model_sd(run.model, metadata)
    if dist.get_rank() == 0:
        Path(directory).mkdir(parents=True)
    dist.barrier()
    content = {k: v for k, v in metadata.items() if k != "dp_cp_group"}
    dist_checkpointing.save(state, directory, content_metadata=content)
