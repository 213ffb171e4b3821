"""The state of Muon and other optimizers that are not Adam, inside of Megatron's chain."""

from __future__ import annotations

from typing import Any

import torch


def state_beside_adam(optimizer: Any) -> list[Any]:
    """This rank's tensors of the state of a chain's optimizers that are not Adam, as arrays."""
    return [
        value.detach().float().clone().numpy()
        for one in optimizer.chained_optimizers
        if not type(one.optimizer).__name__.startswith(("FusedAdam", "Adam"))
        for state in one.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
