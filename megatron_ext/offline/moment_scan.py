"""Compute statistics of stored moments and distances of two checkpoints, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..base.schema import Count, Real
from ..checkpoint.state_keys import StateKey
from ..checkpoint.store import Store
from ..checkpoint.stored import StoredCheckpoint
from ..host.optimizers import SECOND
from .slabs import (
    Piece,
    Progress,
    common_keys,
    pieces_of,
    require_moments,
    slab_pairs,
    slabs,
    without_padding,
)


@dataclass(frozen=True)
class TensorStatistics:
    """Statistics of one tensor of an optimizer's state.

    Args:
        optimizer: Number in the chain; None if the key does not hold it.
        state: ``exp_avg``, ``exp_avg_sq`` or ``param``.
        name: The parameter, or the bucket.
        elements: Number of elements read: everything stored except bucket padding.
        norm: Square root of the sum of squares of the finite elements.
        largest: Largest absolute value of the finite elements; 0 if there are none.
        nonfinite: Number of NaN and infinite elements, and of negative ones of second moments,
            whose square root is taken.
    """

    optimizer: int | None
    state: str
    name: str
    elements: Count
    norm: Real
    largest: Real
    nonfinite: Count


@dataclass(frozen=True)
class TensorDistance:
    """The difference of one tensor between two checkpoints.

    Args:
        optimizer: Number in the chain; None if the key does not hold it.
        state: ``exp_avg``, ``exp_avg_sq`` or ``param``.
        name: The parameter, or the bucket.
        elements: Number of elements compared.
        distance: Norm of b - a; NaN or infinite if an element is so in only one of them.
        relative: `distance` divided by the norm of a; 0 if both are 0, infinite if only the norm
            of a is 0.
        different: Number of elements that are not equal. NaN equals NaN.
    """

    optimizer: int | None
    state: str
    name: str
    elements: Count
    distance: Real
    relative: Real
    different: Count


def scan(stored: StoredCheckpoint, progress: Progress | None = None) -> list[TensorStatistics]:
    """Compute the statistics of every moment and master weight.

    Args:
        stored: A torch_dist checkpoint.
        progress: Called with the number of bytes just read; their sum is `total_bytes`.

    Returns:
        One item per tensor, in the order of the index. A bucket is one tensor.

    Raises:
        CheckpointError: The checkpoint has the legacy format, has no such tensors or is damaged.
    """
    store, keys = require_moments(stored)
    targets = _targets(store, keys)
    sums = {found: [0, 0.0, 0.0, 0] for found in targets}
    # Each file is read from beginning to end.
    ordered = sorted(
        ((found, piece) for found, pieces in targets.items() for piece in pieces),
        key=lambda t: (t[1].info.relative_path, t[1].info.offset),
    )
    for target, piece in ordered:
        total = sums[target]
        for values in slabs(store, piece, progress):
            bad = unusable(values, target.state)
            if bad:
                values = torch.where(torch.isfinite(values), values, 0.0)
            total[0] += values.numel()
            total[1] += float(torch.dot(values, values))
            total[2] = max(total[2], float(values.abs().max()))
            total[3] += bad
    return [
        TensorStatistics(
            found.optimizer,
            found.state,
            found.name,
            int(elements),
            math.sqrt(squares),
            largest,
            int(bad),
        )
        for found, (elements, squares, largest, bad) in sums.items()
    ]


def unusable(part: torch.Tensor, state: str) -> int:
    """Count NaN and infinite elements, and negative ones of a second moment.

    Args:
        part: Floating-point elements of a tensor, at least one.
        state: The optimizer's state that they are; any text for another tensor.
    """
    values = part if part.dtype.itemsize > 1 else part.float()  # fp8 knows no minimum
    low, high = values.aminmax()
    squares = state in SECOND
    if torch.isfinite(low) and torch.isfinite(high) and not (squares and low < 0):
        return 0
    bad = ~torch.isfinite(values)
    return int((bad | (values < 0)).sum() if squares else bad.sum())


def distances(
    a: StoredCheckpoint,
    b: StoredCheckpoint,
    progress: Progress | None = None,
) -> list[TensorDistance]:
    """Compute the distance between the moments and master weights of two checkpoints.

    The tensors of the two may be cut into different pieces.

    Args:
        a: The first checkpoint.
        b: The second checkpoint.
        progress: Called with the number of bytes of `a` just compared.

    Returns:
        One item per tensor that both have with the same shape.

    Raises:
        CheckpointError: A checkpoint has the legacy format, has no such tensors or is damaged.
    """
    (store_a, _), (store_b, _) = require_moments(a), require_moments(b)
    keys = common_keys(a, b)
    targets_a, targets_b = _targets(store_a, keys), _targets(store_b, keys)
    return [
        _distance(found, slab_pairs(store_a, pieces, store_b, targets_b[found], progress))
        for found, pieces in targets_a.items()
        if found in targets_b
    ]


def _targets(store: Store, keys: dict[str, StateKey]) -> dict[StateKey, list[Piece]]:
    """Return the tensors to scan, each with its pieces."""
    pieces = pieces_of(store, keys)
    return {
        found: without_padding(pieces[key]) if found.bucket else pieces[key]
        for key, found in keys.items()
    }


def _distance(
    found: StateKey, slabs: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> TensorDistance:
    elements, different, squares, of_a = 0, 0, 0.0, 0.0
    for x, y in slabs:
        delta = y - x
        # Equal infinities and NaN count as distance 0, although their difference is NaN.
        same = (x == y) | (x.isnan() & y.isnan())
        delta[same] = 0.0
        elements += x.numel()
        different += x.numel() - int(same.sum())
        squares += float(torch.dot(delta, delta))
        of_a += float(torch.dot(x, x))
    distance = math.sqrt(squares) if squares >= 0 else squares
    norm = math.sqrt(of_a) if of_a >= 0 else of_a
    relative = distance / norm if norm else (0.0 if distance == 0 else math.inf)
    return TensorDistance(
        found.optimizer, found.state, found.name, elements, distance, relative, different
    )
