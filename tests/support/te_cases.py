"""What runs on ranks that have Transformer Engine's FusedAdam, and nothing of Megatron's."""

from __future__ import annotations

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
