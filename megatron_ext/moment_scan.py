"""Passes over the moments of a torch_dist checkpoint, a slab at a time.

An item of the store is a ``torch.save`` file of one piece of a tensor. Its pickle is read, not run
(`inert.find_tensor`), and says where the elements are; those are read in slabs of at most
`SLAB_BYTES`, whatever the size of the piece. Sums are in float64.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from . import inert
from .bucket_layout import BucketLayout
from .errors import CheckpointError
from .inspection import StateKey, parse_state_key, state_dtype
from .stored import INDEX, Store, StoredCheckpoint

#: Bytes of a piece that are in memory at once; in float64 and with what is computed from it ten
#: times as much at most.
SLAB_BYTES = 16 << 20

#: The states that are scanned; the last is the name of master weights without a distributed
#: optimizer.
STATES = ("exp_avg", "exp_avg_sq", "param", "fp32_param")

#: Parameters begin at multiples of this in a bucket.
_ALIGNMENT = 64

#: Is told how many bytes of elements have been read since the last call.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class TensorStatistics:
    """One tensor of an optimizer's state.

    Args:
        optimizer: Number in the chain; None where the key does not say.
        state: ``exp_avg``, ``exp_avg_sq`` or ``param``.
        name: The parameter, or the bucket.
        elements: That were read: all that are stored, but for a bucket's padding and, with a
            layout, second copies.
        norm: Square root of the sum of squares of the finite elements.
        largest: Largest absolute value of the finite elements; 0 where there are none.
        nonfinite: Number of NaN and infinite elements.
    """

    optimizer: int | None
    state: str
    name: str
    elements: int
    norm: float
    largest: float
    nonfinite: int


@dataclass(frozen=True)
class TensorDistance:
    """The difference of one tensor of two checkpoints.

    Args:
        optimizer: Number in the chain; None where the key does not say.
        state: ``exp_avg``, ``exp_avg_sq`` or ``param``.
        name: The parameter, or the bucket.
        elements: That were compared.
        distance: Norm of b - a; NaN or infinite where an element is so in one of them only.
        relative: `distance` divided by the norm of a; 0 where both are 0, infinite where only the
            norm of a is.
        different: Elements that are not equal; NaN equals NaN.
    """

    optimizer: int | None
    state: str
    name: str
    elements: int
    distance: float
    relative: float
    different: int


@dataclass(frozen=True)
class _Piece:
    """What is stored as one item, or a part of it.

    Args:
        key: The tensor's in the store.
        offset: Where the item begins in the tensor.
        shape: Of the item.
        info: Its place in a file.
        part: First element and one past the last, counted in the item, which has one dimension
            then; None: all of it.
    """

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    info: Any
    part: tuple[int, int] | None = None

    @property
    def low(self) -> tuple[int, ...]:
        """First corner in the item."""
        return (0,) * len(self.shape) if self.part is None else (self.part[0],)

    @property
    def high(self) -> tuple[int, ...]:
        """The opposite corner, one past the last."""
        return self.shape if self.part is None else (self.part[1],)


def scan(
    stored: StoredCheckpoint,
    progress: Progress | None = None,
    layout: BucketLayout | None = None,
) -> list[TensorStatistics]:
    """Norm, largest value and non-finite elements of every moment and master weight.

    Args:
        stored: A torch_dist checkpoint.
        progress: Is told of bytes that were read; `total_bytes` says how many there will be.
        layout: Which parameters lie where in buckets; without it a bucket is one tensor.

    Returns:
        One for each tensor, in the order of the index or of the layout.

    Raises:
        CheckpointError: It is of the legacy format, has no such tensors, is damaged, or the layout
            is another model's.
    """
    store, keys = _require_moments(stored)
    targets = _targets(stored, store, keys, layout)
    sums = {found: [0, 0.0, 0.0, 0] for found in targets}
    # Files from beginning to end.
    ordered = sorted(
        ((found, piece) for found, pieces in targets.items() for piece in pieces),
        key=lambda t: (t[1].info.relative_path, t[1].info.offset, t[1].low),
    )
    for target, piece in ordered:
        total = sums[target]
        for values in _slabs(store, piece, progress):
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
    """How far every moment and master weight of two checkpoints is apart.

    The pieces of the two need not be cut alike.

    Args:
        a: The first.
        b: The second.
        progress: Is told of bytes of the first that were compared.
        layout: Of the buckets of both; without it a bucket is one tensor.

    Returns:
        One for each tensor that both have with the same shape.

    Raises:
        CheckpointError: One is of the legacy format, has no such tensors, is damaged, or the
            layout is another model's.
    """
    (store_a, keys_a), (store_b, keys_b) = _require_moments(a), _require_moments(b)
    if layout is None:
        keys_a = keys_b = common_keys(a, b)
    targets_a = _targets(a, store_a, keys_a, layout)
    targets_b = _targets(b, store_b, keys_b, layout)
    return [
        _distance(found, _slab_pairs(store_a, pieces, store_b, targets_b[found], progress))
        for found, pieces in targets_a.items()
        if found in targets_b
    ]


def common_keys(a: StoredCheckpoint, b: StoredCheckpoint) -> dict[str, StateKey]:
    """The scanned tensors that two checkpoints have with the same key and shape.

    Args:
        a: The first.
        b: The second.
    """
    return {
        key: found
        for key, found in _keys(a).items()
        if b.tensors.get(key) is not None and b.tensors[key] == a.tensors[key]
    }


def total_bytes(stored: StoredCheckpoint, keys: Iterable[str] | None = None) -> int:
    """Bytes of the elements that are read.

    Args:
        stored: A torch_dist checkpoint.
        keys: Of these tensors; of all that `scan` reads by default.
    """
    if stored.store is None:
        return 0
    entries = stored.store.index.state_dict_metadata
    wanted = _keys(stored) if keys is None else keys
    return sum(
        math.prod(chunk.sizes) * state_dtype(entries[key]).itemsize
        for key in wanted
        for chunk in entries[key].chunks
    )


def _keys(stored: StoredCheckpoint) -> dict[str, StateKey]:
    parsed = ((k, parse_state_key(k)) for k, shape in stored.tensors.items() if shape is not None)
    return {key: found for key, found in parsed if found is not None and found.state in STATES}


def _require_moments(stored: StoredCheckpoint) -> tuple[Store, dict[str, StateKey]]:
    if stored.store is None:
        raise CheckpointError(
            f"{stored.directory}: expected the format torch_dist, found torch, whose moments "
            "--moments does not read. Save it with --ckpt-format torch_dist, or leave --moments out"
        )
    keys = _keys(stored)
    if not keys:
        raise CheckpointError(
            f"{stored.directory}: expected tensors {', '.join(STATES[:3])} of an optimizer, found "
            f"none (sharding {stored.sharding_type}). Leave --moments out"
        )
    return stored.store, keys


def _targets(
    stored: StoredCheckpoint, store: Store, keys: dict[str, StateKey], layout: BucketLayout | None
) -> dict[StateKey, list[_Piece]]:
    """What is looked at as one tensor, and its pieces."""
    pieces = _pieces(store, keys)
    if layout is None:
        return {
            found: _without_padding(pieces[key]) if found.bucket else pieces[key]
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
    store: Store, key: str, pieces_of: dict[str, list[_Piece]], begin: int, end: int
) -> Iterator[_Piece]:
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


def _pieces(store: Store, keys: dict[str, StateKey]) -> dict[str, list[_Piece]]:
    """The pieces of the tensors, each with its place in a file."""
    places: dict[str, dict[tuple[int, ...], Any]] = defaultdict(dict)
    for index, info in store.index.storage_data.items():
        if index.fqn in keys:
            places[index.fqn][tuple(index.offset or ())] = info
    pieces: dict[str, list[_Piece]] = {}
    for key in keys:
        chunks = store.index.state_dict_metadata[key].chunks
        pieces[key] = []
        for chunk in chunks:
            offset = tuple(chunk.offsets)
            if offset not in places[key]:
                raise CheckpointError(
                    f"{store.directory / INDEX}: expected a place for the piece of {key} at "
                    f"{offset}, found none. The index is damaged: restore it or load another "
                    "iteration"
                )
            pieces[key].append(_Piece(key, offset, tuple(chunk.sizes), places[key][offset]))
    return pieces


def _without_padding(pieces: Sequence[_Piece]) -> list[_Piece]:
    """The pieces of a bucket but for what lies between its parameters.

    That is memory which nobody has written (torch.empty, core/optimizer/distrib_optimizer.py:1920,
    0.19.2), and the checkpoint does not mark it. Parameters begin at multiples of 64
    (core/distributed/param_and_grad_buffer.py), so a piece that begins elsewhere is padding unless
    a rank's shard begins there. There it is, up to the next multiple, padding or the last elements
    of a parameter, which cannot be told apart: it is left out.
    """
    kept: list[_Piece] = []
    before: _Piece | None = None
    for piece in sorted(pieces, key=lambda p: p.offset):
        (begin,), (size,) = piece.offset, piece.shape
        shard_begins = before is None or _writer(before) != _writer(piece)
        to_the_next = size < _ALIGNMENT and (begin + size) % _ALIGNMENT == 0
        if begin % _ALIGNMENT == 0 or (shard_begins and not to_the_next):
            kept.append(piece)
        before = piece
    return kept


def _writer(piece: _Piece) -> str:
    """The rank that wrote a piece: files are ``__RANK_NUMBER.distcp``."""
    return str(piece.info.relative_path).lstrip("_").partition("_")[0]


def _place(file: BinaryIO, piece: _Piece) -> inert.TensorPlace:
    place = inert.find_tensor(file)
    if place.shape == piece.shape and len(place.stride) == len(place.shape):
        return place
    if math.prod(place.shape) != math.prod(piece.shape) or place.stride != _dense(place.shape):
        raise ValueError(f"{piece.key}: shape {place.shape} where .metadata says {piece.shape}")
    # A range of a flattened shard (fully_sharded_model_space) may lack the leading ones.
    return place._replace(shape=piece.shape, stride=_dense(piece.shape))


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _slabs(store: Store, piece: _Piece, progress: Progress | None) -> Iterator[torch.Tensor]:
    """All elements of a piece in float64, flat, in parts of at most `SLAB_BYTES`."""
    if 0 in piece.shape:
        return
    with store.open(piece.info, piece.key) as file:
        place = _place(file, piece)
        for low, high in _boxes(place, piece.low, piece.high):
            values = _read_box(file, place, low, high)
            yield values.to(torch.float64).reshape(-1)
            if progress is not None:
                progress(values.numel() * place.dtype.itemsize)


def _boxes(
    place: inert.TensorPlace, low: Sequence[int], high: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a box of a piece until the bytes from its first to its last element fit into a slab."""
    if _span(place, low, high) * place.dtype.itemsize <= SLAB_BYTES:
        yield tuple(low), tuple(high)
        return
    # The dimension that reaches farthest in the file, not merely the first.
    extents = [(h - 1 - at) * s for at, h, s in zip(low, high, place.stride, strict=True)]
    axis = extents.index(max(extents))
    middle = (low[axis] + high[axis]) // 2
    yield from _boxes(place, low, (*high[:axis], middle, *high[axis + 1 :]))
    yield from _boxes(place, (*low[:axis], middle, *low[axis + 1 :]), high)


def _span(place: inert.TensorPlace, low: Sequence[int], high: Sequence[int]) -> int:
    """Elements from the first of a box to its last, in the order of the file."""
    return 1 + sum((h - 1 - at) * s for at, h, s in zip(low, high, place.stride, strict=True))


def _read_box(
    file: BinaryIO, place: inert.TensorPlace, low: Sequence[int], high: Sequence[int]
) -> torch.Tensor:
    size = place.dtype.itemsize
    first = sum(at * s for at, s in zip(low, place.stride, strict=True))
    span = _span(place, low, high)
    begin = place.start + first * size
    data = bytearray(span * size)
    if begin + len(data) > place.end:
        raise ValueError("a tensor that is longer than its storage")
    file.seek(begin)
    if file.readinto(data) != len(data):  # type: ignore[attr-defined]
        raise EOFError(f"the file ends inside a tensor of {place.shape}")
    flat = torch.frombuffer(data, dtype=place.dtype)
    shape = [h - at for at, h in zip(low, high, strict=True)]
    return flat.as_strided(shape, place.stride)


def _distance(
    found: StateKey, slabs: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> TensorDistance:
    elements, different, squares, of_a = 0, 0, 0.0, 0.0
    for x, y in slabs:
        delta = y - x
        # Infinities and NaN that both have are no distance, though their difference is NaN.
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


def _slab_pairs(
    store_a: Store,
    pieces_a: Sequence[_Piece],
    store_b: Store,
    pieces_b: Sequence[_Piece],
    progress: Progress | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A tensor of two checkpoints part by part, however each is cut."""
    by_cut = {(p.key, p.offset, p.shape, p.part): p for p in pieces_b}
    for a in pieces_a:
        alike = by_cut.get((a.key, a.offset, a.shape, a.part))
        for b in [p for p in pieces_b if p.key == a.key] if alike is None else (alike,):
            yield from _common_slabs(store_a, a, store_b, b, progress)


def _common_slabs(
    store_a: Store, a: _Piece, store_b: Store, b: _Piece, progress: Progress | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What two pieces of a tensor have in common, in float64 and flat."""
    low = tuple(map(max, _plus(a.offset, a.low), _plus(b.offset, b.low)))
    high = tuple(map(min, _plus(a.offset, a.high), _plus(b.offset, b.high)))
    if any(begin >= end for begin, end in zip(low, high, strict=True)):
        return
    with store_a.open(a.info, a.key) as file_a, store_b.open(b.info, b.key) as file_b:
        place_a, place_b = _place(file_a, a), _place(file_b, b)
        for box in _boxes(place_a, _minus(low, a.offset), _minus(high, a.offset)):
            there = [_minus(_plus(corner, a.offset), b.offset) for corner in box]
            # Cut further where the same box is spread wider in the other piece.
            for low_b, high_b in _boxes(place_b, *there):
                here = [_minus(_plus(c, b.offset), a.offset) for c in (low_b, high_b)]
                x = _read_box(file_a, place_a, *here).to(torch.float64).reshape(-1)
                y = _read_box(file_b, place_b, low_b, high_b).to(torch.float64).reshape(-1)
                yield x, y
                if progress is not None:
                    progress(x.numel() * place_a.dtype.itemsize)


def _plus(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(i + j for i, j in zip(a, b, strict=True))


def _minus(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(i - j for i, j in zip(a, b, strict=True))
