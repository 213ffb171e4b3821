"""The rules for the moments of one shard, by range. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..base.placement import WHOLE, GlobalIndex
from ..rules.base import ElementRule
from ..rules.elementwise import KEEP


@dataclass(frozen=True, eq=False)
class FillColumns:
    """Set every element to the value of its column. The fused op has no such rule.

    The fill is applied before the fused op, so that the op's statistics "before" count the filled
    values.

    Args:
        values: ``[width]``, one value for each index into the dimensions after the first.
    """

    values: torch.Tensor


@dataclass(frozen=True)
class RangeRule:
    """The rules for a range of a rank's flattened shard of one parameter.

    Args:
        begin: First element.
        end: One past the last element.
        exp_avg: The rule for the first moment.
        exp_avg_sq: The rule for the second moment.
        index: Position of the elements in the unsharded parameter (`base.placement.runs`).
    """

    begin: int
    end: int
    exp_avg: ElementRule | FillColumns = KEEP
    exp_avg_sq: ElementRule | FillColumns = KEEP
    index: GlobalIndex = WHOLE


@dataclass(frozen=True)
class MomentShard:
    """The moments of one parameter on this rank, and their rules.

    Args:
        name: The parameter's name, the same on every layout. Random rules depend on it.
        inner: The torch optimizer that holds the state (`megatron_ext.host.optimizers`).
        param: The key of its state.
        rules: The rules, on ranges that do not overlap. Elements outside of them are kept.
    """

    name: str
    inner: Any
    param: torch.Tensor
    rules: tuple[RangeRule, ...]
