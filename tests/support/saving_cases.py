"""What a save by parameter has stored, read without Megatron and without this package."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from . import harness, policies, unsharded
from .harness import Hyper, Layout


def phase_1(layout: Layout, hyper: Hyper, steps: int, directory: str) -> dict[str, Any]:
    """Train and save with this package; what was saved, and what Megatron warned of."""
    run = policies.build(layout, hyper, "{}")
    harness.train(run, steps)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("megatron.core.optimizer.distrib_optimizer")
    logger.addHandler(handler)
    disabled = logging.root.manager.disable
    logging.disable(logging.NOTSET)
    try:
        logger.warning("a save")
        harness.save(run, directory)
    finally:
        logging.disable(disabled)
        logger.removeHandler(handler)
    return {"state": unsharded.gather(run), "said": said}


def stored(directory: str, state: str) -> dict[str, np.ndarray]:
    """The stored tensors of one state key: the model's key -> float32 array."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    reader = FileSystemReader(directory)
    prefix = f"optimizer.state.{state}."
    found: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(prefix)
    }
    _load_state_dict(found, storage_reader=reader, no_dist=True)
    return {key.removeprefix(prefix): value.numpy() for key, value in found.items()}
