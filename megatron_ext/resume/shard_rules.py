"""What is done to the moments of one shard, range by range. Plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..base.placement import WHOLE, GlobalIndex
from ..rules.base import ElementRule
from ..rules.elementwise import KEEP


@dataclass(frozen=True, eq=False)
class FillColumns:
    """Set every element to its column's value; not a rule of the fused op.

    The elements are filled before the others are changed, so that the statistics before count the
    new values.

    Args:
        values: ``[width]``, one for each index into the dimensions after the first.
    """

    values: torch.Tensor


@dataclass(frozen=True)
class RangeRule:
    """What is done to a range of a rank's flattened shard of one parameter.

    Args:
        begin: First element.
        end: One past the last.
        exp_avg: What is done to exp_avg.
        exp_avg_sq: What is done to exp_avg_sq.
        index: Where the elements lie in the unsharded parameter (`base.placement.runs`).
    """

    begin: int
    end: int
    exp_avg: ElementRule | FillColumns = KEEP
    exp_avg_sq: ElementRule | FillColumns = KEEP
    index: GlobalIndex = WHOLE


@dataclass(frozen=True)
class MomentShard:
    """Adam's moments of one parameter on this rank, and what is to be done to them.

    Args:
        name: The parameter's name, the same on every layout: random rules depend on it.
        inner: The torch optimizer that holds the state (torch AdamW, TE or apex FusedAdam).
        param: The key of its state.
        rules: Ranges that do not overlap; what none covers is kept.
    """

    name: str
    inner: Any
    param: torch.Tensor
    rules: tuple[RangeRule, ...]
