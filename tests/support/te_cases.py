"""What runs on ranks that have Transformer Engine's FusedAdam, and nothing of Megatron's."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from . import harness, te_extension


def steps(
    weights: list[np.ndarray],
    gradients: list[list[np.ndarray]],
    hyper: dict[str, Any],
    **kinds: Any,
) -> list[dict[str, np.ndarray]]:
    """Master weights, moments and weights after steps of FusedAdam, for each parameter."""
    from transformer_engine.pytorch.optimizers import FusedAdam

    params = [torch.nn.Parameter(torch.from_numpy(w).bfloat16()) for w in weights]
    inner = FusedAdam(params, master_weights=True, use_decoupled_grad=True, **hyper, **kinds)
    for of_step in gradients:
        for param, gradient in zip(params, of_step, strict=True):
            param.decoupled_grad = torch.from_numpy(gradient)
        inner.step()
    found = [
        {**harness.values_of(inner, param), "weight": param.detach().float()} for param in params
    ]
    return [{k: v.detach().float().numpy() for k, v in one.items()} for one in found]


def round_trip(masters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bf16 weights of master weights that are split, and what both halves join to."""
    high, low = te_extension.split(torch.from_numpy(masters))
    return high.float().numpy(), te_extension.joined(high, low).numpy()


def fused_sgd() -> dict[str, Any]:
    """The class that Megatron takes for --optimizer sgd, its row, and what it allocates."""
    import importlib

    from megatron_ext.host.optimizers import state_of

    cls = importlib.import_module("megatron.core.optimizer").SGD
    param = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = cls([param], lr=0.1, weight_decay=0.1, momentum=0.9)
    param.grad = torch.ones(6, 4)
    with contextlib.suppress(NotImplementedError):
        optimizer.step()
    return {
        "class": cls.__name__,
        "module": cls.__module__,
        "row": state_of(optimizer),
        "state": {k: tuple(v.shape) for k, v in optimizer.state[param].items()},
        "group": set(optimizer.param_groups[0]) - {"params"},
    }
