"""Give moments as values, including those that TransformerEngine stores with a scale."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import PlanError
from ..host.optimizers import state_of
from ..rules.base import ElementRule
from ..rules.elementwise import KEEP
from ..rules.form import MOMENTS
from .shard_rules import FillColumns, MomentShard

#: The largest value that TE stores in a dtype (`FusedAdam.dtype_to_range_map`).
_LARGEST_STORED = {torch.float16: 65504.0 / 2.0, torch.uint8: 448.0}
_E4M3_NAN = 0x7F


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


def open_moment(shard: MomentShard, which: int) -> OpenMoment | None:
    """Open one moment of a shard: its values, and the function that writes them back.

    Args:
        shard: The shard.
        which: 0 for the first moment, 1 for the second one.

    Returns:
        None if the optimizer has no such moment.

    Raises:
        PlanError: It has no state for it, or there is a rule for a moment that it lacks.
    """
    described = state_of(shard.inner)
    key = described.tensor(MOMENTS[which])
    if key is None:
        if all(rule == KEEP for rule in rules_of(shard, which)):
            return None
        raise PlanError(f"{shard.name} has no {MOMENTS[which]} to change: its state is {described}")
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
    return OpenMoment(unscaled, lambda: store(shard.inner, shard.param, key, unscaled()))


def is_scaled(inner: Any, key: str) -> bool:
    """Whether TE keeps this moment in fp16 or fp8 with a scale per tensor."""
    dtypes = getattr(inner, "name_to_dtype_map", {})
    return dtypes.get(key) in (torch.float16, torch.uint8)


@torch.no_grad()
def store(inner: Any, param: torch.Tensor, key: str, values: torch.Tensor) -> None:
    """Write a scaled moment, which may be zero or not finite, without waiting for its device.

    TE's ``set_scaled_state`` divides by the largest value. One NaN or infinite element makes the
    whole tensor NaN. So do zeros in fp8, and values so small that fp32 does not have the scale's
    reciprocal. Here such an element does not count for the scale, and values that small become 0.

    Args:
        inner: TE's FusedAdam, which has state for the parameter.
        param: The key of its state.
        key: ``exp_avg`` or ``exp_avg_sq``.
        values: fp32, of the parameter's shape.
    """
    if not values.numel():
        return
    stored = inner.state[param][key]
    finite = values.isfinite()
    usable = values.where(finite, 0.0)
    low, high = torch.aminmax(usable)
    smallest = _LARGEST_STORED[inner.name_to_dtype_map[key]] * torch.finfo(torch.float32).tiny
    too_small = torch.maximum(-low, high) < smallest
    # In the place of values that are too small, a number with a scale; it is overwritten.
    inner.set_scaled_state(param, key, usable.masked_fill_(too_small, 1.0))
    if hasattr(stored, "_data"):
        data = stored._data
        data.masked_fill_(too_small, 0)
        data.masked_fill_(~finite.view(data.shape), _E4M3_NAN)  # it has no infinity
    else:
        stored.masked_fill_(too_small, 0.0)
        stored.copy_(stored.where(finite.view(stored.shape), values.view(stored.shape)))


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
