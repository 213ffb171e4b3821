"""Find the optimizers inside a Megatron optimizer."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import HostError
from ..host.contract import CORE
from .session import Resume


def members_of(optimizer: Any) -> list[Any]:
    """List this package's optimizers in a Megatron optimizer: itself, or the members of a chain."""
    chain = getattr(optimizer, "chained_optimizers", None)
    if chain is not None:
        return [m for o in chain for m in members_of(o)]
    return [optimizer] if isinstance(getattr(optimizer, "resume", None), Resume) else []


def adam_optimizers(optimizer: Any) -> list[Any]:
    """List the optimizers in a Megatron optimizer: itself, or the members of a chain.

    They may be this package's or stock.

    Raises:
        HostError: One of them keeps its state where it cannot be reached. The message names it.
    """
    chain = getattr(optimizer, "chained_optimizers", None)
    if chain is not None:
        return [m for o in chain for m in adam_optimizers(o)]
    core = importlib.import_module(CORE)
    known = ("DistributedOptimizer", "Float16OptimizerWithFloat16Params", "FP32Optimizer")
    torch_optimizer = getattr(optimizer, "optimizer", None)
    inner = type(torch_optimizer).__name__
    if not isinstance(optimizer, tuple(getattr(core, name) for name in known)):
        raise HostError(
            f"cannot reach the moments of {type(optimizer).__name__} over {inner}; expected "
            f"{', '.join(known)} or a ChainedOptimizer of these"
        )
    return [optimizer]
