"""Give moments as values, including those that TransformerEngine stores with a scale."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint.state import MOMENT_KEYS
from ..errors import PlanError
from ..rules.base import ElementRule
from ..rules.elementwise import KEEP
from .shard_rules import FillColumns, MomentShard


def values(inner: Any, param: torch.Tensor, key: str) -> torch.Tensor:
    """Return one moment as flat fp32, bf16 or fp16 values; a scaled moment as an fp32 copy."""
    if is_scaled(inner, key):
        unscaled: torch.Tensor = inner.get_unscaled_state(param, key)
        return unscaled.view(-1)
    held: torch.Tensor = inner.state[param][key]
    return held.view(-1)


@dataclass(frozen=True)
class OpenMoment:
    """One moment of a shard.

    Args:
        tensor: Returns the values to change: the state itself, or a copy of a scaled moment.
        close: Writes the result back to the state.
        only_scale: Whether `close` alone makes the whole change.
    """

    tensor: Callable[[], torch.Tensor]
    close: Callable[[], None] = lambda: None
    only_scale: bool = False


def open_moment(shard: MomentShard, which: int) -> OpenMoment:
    """Open one moment of a shard: its values, and the function that writes them back.

    Raises:
        PlanError: The optimizer has no state for it.
    """
    key = MOMENT_KEYS[which]
    state = shard.inner.state.get(shard.param, {})
    if key not in state:
        raise PlanError(f"{shard.name} has no {key} to change: the optimizer has no state for it")
    if not is_scaled(shard.inner, key):
        return OpenMoment(lambda: state[key])
    rules = rules_of(shard, which)
    factor = _whole_scale(shard, rules, state[key].numel())
    # The fp32 copy is made once, when it is first needed.
    unscaled = functools.cache(lambda: shard.inner.get_unscaled_state(shard.param, key))
    if factor is not None:
        rescale = functools.partial(_rescale, shard.inner, shard.param, key, factor)
        return OpenMoment(unscaled, rescale, only_scale=True)
    if all(r == KEEP for r in rules):
        return OpenMoment(unscaled, only_scale=True)
    return OpenMoment(unscaled, lambda: shard.inner.set_scaled_state(shard.param, key, unscaled()))


def is_scaled(inner: Any, key: str) -> bool:
    """Whether TE keeps this moment in fp16 or fp8 with a scale per tensor."""
    dtypes = getattr(inner, "name_to_dtype_map", {})
    return dtypes.get(key) in (torch.float16, torch.uint8)


def rules_of(shard: MomentShard, which: int) -> list[ElementRule | FillColumns]:
    """List the rules for one moment of a shard: 0 is exp_avg, 1 is exp_avg_sq."""
    return [r.exp_avg_sq if which else r.exp_avg for r in shard.rules]


def _whole_scale(
    shard: MomentShard, rules: Sequence[ElementRule | FillColumns], numel: int
) -> float | None:
    """Return the factor if the only rule multiplies all elements by a positive factor."""
    if len(rules) != 1 or (shard.rules[0].begin, shard.rules[0].end) != (0, numel):
        return None
    rule = rules[0]
    if isinstance(rule, FillColumns) or rule == KEEP:
        return None
    return rule.multiplier if rule.multiplier is not None and rule.multiplier > 0.0 else None


def _rescale(inner: Any, param: torch.Tensor, key: str, factor: float) -> None:
    """Multiply a scaled moment through its scale.

    An fp16 value is stored * _scales. An fp8 value (Float8Tensor) is stored * _scale_inv, and the
    quantizer has the reciprocal.
    """
    inner._scales[param][key].mul_(factor)
    stored = inner.state[param][key]
    if hasattr(stored, "_scale_inv"):
        stored._scale_inv.mul_(factor)
        stored._quantizer.scale.div_(factor)
