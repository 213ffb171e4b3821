"""Load HybridDeviceOptimizer (``--optimizer-cpu-offload``), whose state has two owners.

Its inner optimizers, on the CPU and on the device, make the steps with fp32 weights and moments of
their own. Megatron saves and loads its ``state``, which names the same tensors.
"""

from __future__ import annotations

from typing import Any

from .steps import is_hybrid


def allocate(inner: Any) -> None:
    """Make the state of its parameters, and leave their weights as they are.

    Stock makes it with one step along random gradients (core/optimizer/distrib_optimizer.py:928,
    0.19.2). The step moves the inner optimizers' weights, which are those of the model's
    initialisation, and writes them into the model. A legacy load has just put the checkpoint's
    weights there: they are lost (issue #1842 of Megatron-LM). New rows of the vocabulary are moved.
    """
    if not is_hybrid(inner) or inner.state:
        return
    for param, own in inner.param_to_inner_param.items():
        if own is not param:
            own.data.copy_(param)
    rates = [group["lr"] for group in inner.param_groups]
    for group in inner.param_groups:
        group["lr"] = 0.0
    inner.dummy_step()
    for group, rate in zip(inner.param_groups, rates, strict=True):
        group["lr"] = rate


def hand_over(inner: Any) -> None:
    """Give the inner optimizers what was loaded.

    Stock does so after a load of torch_dist only (core/optimizer/distrib_optimizer.py:2118 and
    2407, 0.19.2): after one of legacy torch they go on with the random step's weights and moments.
    """
    if is_hybrid(inner):
        inner._sync_hdo_state_to_sub_optimizers()
