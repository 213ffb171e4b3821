"""Fit the state that one kind of optimizer has saved to another kind.

What is stored by parameter fits every kind: the distributed optimizer and the others, one optimizer
and a chain with one more for the experts, which Megatron has as soon as they are spread over ranks
(core/optimizer/__init__.py:484, 0.19.2). The rest of a state dict, which the parameters of an
optimizer share, is arranged anew here.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint.state import optimizer_section, read_optimizer


def fit_chain(requested: Any, loaded: dict[Any, Any]) -> None:
    """Give each current optimizer the common state of the saved ones.

    Args:
        requested: The optimizers' sharded state dict: by number for a chain.
        loaded: What the load made of it. It is modified in place.
    """
    numbers = [key for key in requested if isinstance(key, int)]
    saved = [key for key in loaded if isinstance(key, int)]
    if numbers and len(saved) < len(loaded):
        common = {key: loaded.pop(key) for key in list(loaded) if not isinstance(key, int)}
        for number in numbers:
            loaded[number] = _joined(copy.deepcopy(common), loaded[number])
    elif saved and not numbers:
        parts = [loaded.pop(number) for number in saved]
        common = parts[0]
        for part in parts[1:]:
            _groups(common).extend(_groups(part))
        own = {key: loaded.pop(key) for key in list(loaded)}
        loaded.update(_joined(common, own))


def for_distributed(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arrange a state dict for a DistributedOptimizer.

    Args:
        state_dict: Its argument, after a load. If another kind has saved it, its param_groups are
            elsewhere and it does not say how its parameters are stored.
    """
    if "param_state" not in state_dict or "param_state_sharding_type" in state_dict:
        return state_dict
    _, section = optimizer_section(state_dict)
    step = read_optimizer(state_dict).step
    groups = [{**g, **({} if step is None else {"step": step})} for g in section["param_groups"]]
    rest = ("grad_scaler", "param_state")
    return {
        **{key: state_dict[key] for key in rest if key in state_dict},
        "optimizer": {"param_groups": groups},
        "param_state_sharding_type": "fully_reshardable",
    }


def for_replicated(
    state_dict: Mapping[str, Any], *, masters: bool, step_in_state: bool
) -> Mapping[str, Any]:
    """Arrange a state dict for an optimizer that is not distributed.

    Args:
        state_dict: Its argument, after a load.
        masters: Whether it has master weights (Float16OptimizerWithFloat16Params).
        step_in_state: Whether its inner optimizer keeps the step with each parameter.
    """
    _, section = optimizer_section(state_dict)
    nested = state_dict.get("optimizer")
    own = nested if masters and isinstance(nested, Mapping) else state_dict
    state = own.get("state", section.get("state", {}))
    step = read_optimizer(state_dict).step
    known = "common_step" in state or any(
        "step" in s for s in state.values() if isinstance(s, Mapping)
    )
    if step_in_state and step is not None and not known:
        state = {**state, "common_step": torch.tensor(float(step))}
    inner = {"state": state, "param_groups": section["param_groups"]}
    if not masters:
        return inner
    rest = ("grad_scaler", "fp32_from_fp16_params", "fp32_from_fp16")
    return {**{key: state_dict[key] for key in rest if key in state_dict}, "optimizer": inner}


def _groups(state_dict: Any) -> list[Any]:
    section = state_dict.get("optimizer", state_dict)
    groups: list[Any] = section["param_groups"]
    return groups


def _joined(common: Any, own: Any) -> Any:
    """Join two nested dicts; where both have a value, it is the own one."""
    if not isinstance(common, Mapping) or not isinstance(own, Mapping):
        return own
    out = dict(common)
    for key, value in own.items():
        out[key] = _joined(common[key], value) if key in common else value
    return out
