"""HybridDeviceOptimizer (CPU offload) where there is no GPU.

It decides by ``param.is_cuda`` which parameters have a copy on the CPU. While it does, a parameter
says True and a copy that was pinned says False; nothing else of it is changed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch


class _Pinned(torch.Tensor):
    """A copy on the CPU; what is made of it is one too."""

    is_cuda = False


def _plain(found: Any, known: dict[int, torch.Tensor]) -> Any:
    """Replace the copies by ordinary tensors, the same one wherever it was the same."""
    if isinstance(found, _Pinned):
        return known.setdefault(id(found), found.as_subclass(torch.Tensor))
    if isinstance(found, dict):
        return {_plain(k, known): _plain(v, known) for k, v in found.items()}
    if isinstance(found, list | tuple):
        return type(found)(_plain(one, known) for one in found)
    return found


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Let HybridDeviceOptimizer take the parameters of this machine for a GPU's."""
    from megatron.core.optimizer import Adam
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    # Its param_groups name them, and up to 0.18 a load unpickles only what is named here; verl does
    # the same.
    torch.serialization.add_safe_globals([torch.optim.AdamW, Adam])
    stock = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    @functools.wraps(stock)
    def partition(self: Any, fraction: float) -> Any:
        before = torch.Tensor.pin_memory
        torch.Tensor.pin_memory = lambda tensor, *_: tensor.as_subclass(_Pinned)  # type: ignore
        torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment,misc]
        try:
            found = stock(self, fraction)
        finally:
            del torch.Tensor.is_cuda
            torch.Tensor.pin_memory = before  # type: ignore[method-assign]
        return _plain(found, {})

    stream = type(torch.cuda.current_stream())
    record = stream.record_event
    HybridDeviceOptimizer._get_sub_optimizer_param_groups = partition
    stream.record_event = lambda *_: torch.cuda.Event()  # type: ignore[method-assign]
    try:
        yield
    finally:
        HybridDeviceOptimizer._get_sub_optimizer_param_groups = stock
        stream.record_event = record  # type: ignore[method-assign]
