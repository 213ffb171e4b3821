"""Compute statistics of stored moments and distances of two checkpoints, in bounded memory."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..base.schema import Count, Real
from ..checkpoint.bucket_layout import BucketLayout
from ..checkpoint.state_keys import StateKey
from ..checkpoint.store import INDEX, Store
from ..checkpoint.stored import StoredCheckpoint
from ..errors import CheckpointError
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
        elements: Number of elements read: everything stored except bucket padding and, with a
            layout, duplicate copies.
        norm: Square root of the sum of squares of the finite elements.
        largest: Largest absolute value of the finite elements; 0 if there are none.
        nonfinite: Number of NaN and infinite elements.
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


def scan(
    stored: StoredCheckpoint,
    progress: Progress | None = None,
    layout: BucketLayout | None = None,
) -> list[TensorStatistics]:
    """Compute the statistics of every moment and master weight.

    Args:
        stored: A torch_dist checkpoint.
        progress: Called with the number of bytes just read; their sum is `total_bytes`.
        layout: Positions of the parameters in buckets; without it a bucket is one tensor.

    Returns:
        One item per tensor, in the order of the index or of the layout.

    Raises:
        CheckpointError: The checkpoint has the legacy format, has no such tensors or is damaged,
            or the layout belongs to another model.
    """
    store, keys = require_moments(stored)
    targets = _targets(stored, store, keys, layout)
    sums = {found: [0, 0.0, 0.0, 0] for found in targets}
    # Each file is read from beginning to end.
    ordered = sorted(
        ((found, piece) for found, pieces in targets.items() for piece in pieces),
        key=lambda t: (t[1].info.relative_path, t[1].info.offset, t[1].low),
    )
    for target, piece in ordered:
        total = sums[target]
        for values in slabs(store, piece, progress):
            finite = torch.isfinite(values)
            bad = values.numel() - int(finite.sum())
            if bad:
                values = torch.where(finite, values, 0.0)
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


def distances(
    a: StoredCheckpoint,
    b: StoredCheckpoint,
    progress: Progress | None = None,
    layout: BucketLayout | None = None,
) -> list[TensorDistance]:
    """Compute the distance between the moments and master weights of two checkpoints.

    The tensors of the two may be cut into different pieces.

    Args:
        a: The first checkpoint.
        b: The second checkpoint.
        progress: Called with the number of bytes of `a` just compared.
        layout: Positions of the parameters in the buckets of both; without it a bucket is one
            tensor.

    Returns:
        One item per tensor that both have with the same shape.

    Raises:
        CheckpointError: A checkpoint has the legacy format, has no such tensors or is damaged, or
            the layout belongs to another model.
    """
    (store_a, keys_a), (store_b, keys_b) = require_moments(a), require_moments(b)
    if layout is None:
        keys_a = keys_b = common_keys(a, b)
    targets_a = _targets(a, store_a, keys_a, layout)
    targets_b = _targets(b, store_b, keys_b, layout)
    return [
        _distance(found, slab_pairs(store_a, pieces, store_b, targets_b[found], progress))
        for found, pieces in targets_a.items()
        if found in targets_b
    ]


def _targets(
    stored: StoredCheckpoint, store: Store, keys: dict[str, StateKey], layout: BucketLayout | None
) -> dict[StateKey, list[Piece]]:
    """Return the tensors to scan, each with its pieces."""
    pieces = pieces_of(store, keys)
    if layout is None:
        return {
            found: without_padding(pieces[key]) if found.bucket else pieces[key]
            for key, found in keys.items()
        }
    _require_fit(stored, keys, layout)
    targets = {found: pieces[key] for key, found in keys.items() if not found.bucket}
    for state in dict.fromkeys(found.state for found in keys.values() if found.bucket):
        sorted_pieces = {
            key: sorted(pieces[key], key=lambda p: p.offset)
            for key, found in keys.items()
            if found.bucket and found.state == state
        }
        for name, parts in layout.unsharded():
            number = keys[f"{parts[0][0]}.{state}"].optimizer
            targets[StateKey(number, state, name, False)] = [
                piece
                for key, begin, end in parts
                for piece in _range(store, f"{key}.{state}", sorted_pieces, begin, end)
            ]
    return targets


def _require_fit(stored: StoredCheckpoint, keys: dict[str, StateKey], layout: BucketLayout) -> None:
    """Raise unless the layout has the buckets of every state of the checkpoint."""
    by_state: dict[str, dict[str, int]] = defaultdict(dict)
    for key, found in keys.items():
        if found.bucket:
            by_state[found.state][key.removesuffix(f".{found.state}")] = math.prod(
                stored.tensors[key] or ()
            )
    if not by_state:
        raise CheckpointError(
            f"--layout with {stored.directory}: expected dp_reshardable, whose moments are in "
            f"buckets, found {stored.sharding_type}, which names the parameters itself. Leave "
            "--layout out"
        )
    for state, elements in by_state.items():
        if different := layout.misfits(elements):
            raise CheckpointError(
                f"--layout with {stored.directory}: expected the layout of the run that wrote "
                f"it, found another one: of {state}, {different}. Write it with "
                "--selective-dry-run --selective-report DIR and that run's model and parallel "
                "sizes"
            )


def _range(
    store: Store, key: str, pieces_of: dict[str, list[Piece]], begin: int, end: int
) -> Iterator[Piece]:
    """The parts of a bucket's pieces, in order, between two of its elements."""
    pieces = pieces_of[key]
    first = bisect.bisect_right(pieces, begin, key=lambda p: p.offset[0]) - 1
    at = begin
    for number in range(max(first, 0), len(pieces)):
        piece = pieces[number]
        (offset,), (size,) = piece.offset, piece.shape
        if offset >= end:
            break
        low, high = max(begin, offset), min(end, offset + size)
        if low != at:
            break
        if high > low:
            yield dataclasses.replace(piece, part=(low - offset, high - offset))
        at = high
    if at != end:
        raise CheckpointError(
            f"{store.directory / INDEX}: expected pieces of {key} without a gap, found "
            f"none for element {at}. The index is damaged: restore it or load another iteration"
        )


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
