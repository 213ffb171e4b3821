"""Look over the moments of an optimizer: norms, and what it cannot use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import _ops
from .._ops.segments import STATISTICS_COLUMNS, Statistics
from ..host.optimizers import state_of
from .moments import announce, transform
from .scaled import is_scaled
from .shard_rules import MomentShard

_COUNTED = [STATISTICS_COLUMNS.index(name) for name in ("square_sum_after", "nonfinite")]


@dataclass(frozen=True)
class Survey:
    """Statistics of the moments of some parameters.

    Args:
        nonfinite: Number of elements of each parameter that the optimizer cannot use: NaN,
            infinite, or negative in a second moment.
        norms: Euclidean norm of each moment over all parameters.
    """

    nonfinite: list[int]
    norms: tuple[float, ...]


@torch.no_grad()
def survey(inner: Any, params: Sequence[torch.Tensor]) -> Survey:
    """Compute the norms of some parameters' moments and count what is unusable, in one pass.

    Args:
        inner: The torch optimizer that holds the state.
        params: Keys of its state that have all moments.
    """
    names = state_of(inner).tensors
    if len(names) < 2 or any(is_scaled(inner, key) for key in names):
        counted = transform([MomentShard("", inner, p, ()) for p in params], Statistics.AFTER)
        norms = [math.hypot(*(c[key].norm_after for c in counted)) for key in names]
        return Survey([sum(s.nonfinite for s in c.values()) for c in counted], tuple(norms))
    counts, squares = [0] * len(params), [0.0, 0.0]
    by_device: dict[torch.device, list[int]] = {}
    for i, param in enumerate(params):
        by_device.setdefault(inner.state[param][names[0]].device, []).append(i)
    for device, members in by_device.items():
        announce(device.type)
        both = ([inner.state[params[i]][key] for i in members] for key in names)
        found = _ops.Transform.keep(*both)(Statistics.AFTER)[:, :, _COUNTED].tolist()
        for i, rows in zip(members, found, strict=True):
            for which, (square, nonfinite) in enumerate(rows):
                squares[which] += square
                counts[i] += int(nonfinite)
    return Survey(counts, (math.sqrt(squares[0]), math.sqrt(squares[1])))
