"""Every torch optimizer that Megatron can build, at work on one matrix."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

#: Of a class that does not run: why.
BROKEN = {
    # Its __init__ does not call AdaptiveMuon's, which sets scale_mode
    # (core/optimizer/emerging_optimizers.py:365, 0.19.2, with emerging-optimizers 0.3.0).
    "TensorParallelAdaptiveMuon": "no attribute 'scale_mode'",
}
LR = 1e-3


def described() -> dict[str, dict[str, Any]]:
    """For each name that Megatron builds an optimizer by: its class, state, group and first steps.

    The names are those of Megatron's registry, of its own branches (adam, sgd, lion) and of torch.
    """
    return {name: _tried(cls) for name, cls in _classes()}


def _classes() -> Iterator[tuple[str, type]]:
    core = importlib.import_module("megatron.core.optimizer")
    yield "adam", core.Adam
    yield "sgd", core.SGD
    yield "adamw of torch", core.CPUAdam
    yield "adam of torch", torch.optim.Adam
    yield "sgd of torch", core.CPUSGD
    for name, entry in core._EMERGING_OPTIMIZERS.items():
        yield name, entry.optimizer_cls


def _tried(cls: type) -> dict[str, Any]:
    from megatron_ext.host.optimizers import state_of

    generator = torch.Generator().manual_seed(7)
    param = torch.nn.Parameter(torch.full((6, 4), 0.25))  # rows and columns as Sinkhorn's
    gradients = [torch.randn(6, 4, generator=generator) for _ in range(2)]
    known = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    asked = {"lr": LR, "momentum": 0.9, "weight_decay": 0.0}
    optimizer = cls([param], **{k: v for k, v in asked.items() if k in known or "kwargs" in known})
    steps, error = [], ""
    try:
        for gradient in gradients:
            param.grad = gradient.clone()
            optimizer.step()
            steps.append({k: _plain(v) for k, v in optimizer.state[param].items()})
    except AttributeError as e:
        error = str(e)
    row = state_of(optimizer)
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    return {
        "class": cls.__name__,
        "row": row,
        "state": {k: getattr(v, "shape", None) for k, v in optimizer.state[param].items()},
        "group": group,
        "steps": steps,
        "gradients": [g.double().numpy() for g in gradients],
        "error": error,
    }


def _plain(value: Any) -> Any:
    return value.double().numpy().copy() if isinstance(value, torch.Tensor) else value
