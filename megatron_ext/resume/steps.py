"""Read and write the ``step`` where an inner optimizer keeps it."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import CheckpointError
from ..host.optimizers import state_of, state_of_member


def is_torch_adam(inner: Any) -> bool:
    """Whether the inner optimizer is torch's, which keeps ``step`` in each parameter's state."""
    return isinstance(inner, torch.optim.Adam | torch.optim.AdamW)


def decays_decoupled(optimizer: Any) -> bool:
    """Whether weight decay is not added to the gradient.

    Megatron's flag is for Adam. Those of emerging-optimizers have a method
    (emerging_optimizers/mixin.py, 0.3.0).
    """
    state = state_of_member(optimizer)
    if state.adam:
        return bool(getattr(optimizer.config, "decoupled_weight_decay", True))
    method = getattr(optimizer.optimizer, "weight_decay_method", "decoupled")
    return method != "l2" and not state.coupled_decay


def is_hybrid(inner: Any) -> bool:
    """Whether it is HybridDeviceOptimizer (CPU offload), which has several inner optimizers."""
    return type(inner).__name__ == "HybridDeviceOptimizer"


def parameters_of(inner: Any) -> list[torch.Tensor]:
    """List the parameters of an inner optimizer on this rank; there may be none, and no optimizer.

    Args:
        inner: The torch optimizer, or None.
    """
    groups = () if inner is None else inner.param_groups
    return [param for group in groups for param in group["params"]]


def step_of(inner: Any) -> int | None:
    """Return the step of a live optimizer; None before the first step.

    A group without parameters does not count its steps. With CPU offload it is the step that
    Megatron would save (core/optimizer/distrib_optimizer.py:841, 0.19.2): that of the first inner
    optimizer on the CPU. After a load by stock the others have another one.

    Raises:
        CheckpointError: Its groups or parameters have different steps.
    """
    if is_hybrid(inner):
        counting = sorted(inner.sub_optimizers, key=lambda one: not is_torch_adam(one))
        return next((step for one in counting if (step := step_of(one)) is not None), None)
    of_groups = {
        int(g["step"]) for g in inner.param_groups if g["params"] and g.get("step") is not None
    }
    of_state = {int(s["step"]) for s in inner.state.values() if "step" in s}
    in_state = state_of(inner).step == "state"
    found = (of_state or of_groups) if in_state else (of_groups or of_state)
    if len(found) > 1:
        raise CheckpointError(
            f"the optimizer's param_groups disagree about step: found {sorted(found)}, expected one"
        )
    return found.pop() if found else None


def place_step(inner: Any, step: int | None) -> None:
    """Write ``step`` where the inner optimizer reads it; one that reads none is left alone.

    SOAP and LaProp read an int in each parameter's state, torch's Adam a tensor. Stock gives all
    parameters of the latter the same tensor, which then advances once per parameter
    (distrib_optimizer.py, 0.19.2 lines 1012-1018). FusedAdam reads an int in each group. Before
    each step HybridDeviceOptimizer copies its groups into those of its inner optimizers
    (core/optimizer/cpu_offloading/hybrid_optimizer.py:160, 0.19.2), so that with a step in its own
    groups FusedAdam would begin at the same step again each time.
    """
    if is_hybrid(inner):
        for group in inner.param_groups:
            group.pop("step", None)
        for one in inner.sub_optimizers:
            place_step(one, step)
        return
    where = state_of(inner).step
    if where == "group":
        for group in inner.param_groups:
            if step is not None:
                group["step"] = step
    if where != "state":
        return
    for group in inner.param_groups:
        group.pop("step", None)
        on_device = group.get("capturable") or group.get("fused")
        for param in group["params"]:
            state = inner.state.get(param)
            if state and not is_torch_adam(inner):
                state["step"] = step or 0
            elif state:
                device = param.device if on_device else torch.device("cpu")
                state["step"] = torch.tensor(float(step or 0), dtype=torch.float32, device=device)
