"""Read stored tensors piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from ..checkpoint import placeholders, torch_file
from ..checkpoint.state_keys import StateKey, parse_state_key, state_dtype
from ..checkpoint.store import INDEX, Store
from ..checkpoint.stored import StoredCheckpoint
from ..errors import CheckpointError
from ..host.optimizers import STORED
from .bucket_edges import ALIGNMENT

#: Bytes of a piece that are read at once. With the float64 copy and temporaries, at most ten times
#: as much memory is used.
SLAB_BYTES = 16 << 20
#: The scanned states. ``fp32_param`` is the master weight without a distributed optimizer.
STATES = (*STORED, "param", "fp32_param")
#: Function that is called with the number of bytes of elements read since the last call.
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Piece:
    """An item of the store.

    Args:
        key: Key of the tensor in the store.
        offset: Position of the item in the tensor.
        shape: Shape of the item.
        info: Its place in a file.
    """

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    info: Any


def common_keys(a: StoredCheckpoint, b: StoredCheckpoint) -> dict[str, StateKey]:
    """Return the scanned tensors that two checkpoints have with the same key and shape.

    Args:
        a: The first checkpoint.
        b: The second checkpoint.
    """
    return {
        key: found
        for key, found in moment_keys(a).items()
        if b.tensors.get(key) is not None and b.tensors[key] == a.tensors[key]
    }


def total_bytes(stored: StoredCheckpoint, keys: Iterable[str] | None = None) -> int:
    """Compute how many bytes of elements will be read.

    Args:
        stored: A torch_dist checkpoint.
        keys: The tensors; by default all that `scan` reads.
    """
    if stored.store is None:
        return 0
    entries = stored.store.index.state_dict_metadata
    wanted = moment_keys(stored) if keys is None else keys
    return sum(
        math.prod(chunk.sizes) * state_dtype(entries[key]).itemsize
        for key in wanted
        for chunk in entries[key].chunks
    )


def moment_keys(stored: StoredCheckpoint) -> dict[str, StateKey]:
    """Return the parsed checkpoint keys of the moments and master weights."""
    parsed = ((k, parse_state_key(k)) for k, shape in stored.tensors.items() if shape is not None)
    return {key: found for key, found in parsed if found is not None and found.state in STATES}


def require_moments(stored: StoredCheckpoint) -> tuple[Store, dict[str, StateKey]]:
    """Return the store and the keys of its moments.

    Raises:
        CheckpointError: There is no store, or it has no moments.
    """
    if stored.store is None:
        raise CheckpointError(
            f"{stored.directory}: expected the format torch_dist, found torch, whose moments "
            "--moments does not read. Save it with --ckpt-format torch_dist, or leave --moments out"
        )
    keys = moment_keys(stored)
    if not keys:
        raise CheckpointError(
            f"{stored.directory}: expected tensors {', '.join(STATES[:-1])} of an optimizer, found "
            f"none (sharding {stored.sharding_type}). Leave --moments out"
        )
    return stored.store, keys


def pieces_of(store: Store, keys: Collection[str]) -> dict[str, list[Piece]]:
    """Return the pieces of the tensors, each with its place in a file."""
    places: dict[str, dict[tuple[int, ...], Any]] = {key: {} for key in keys}
    for index, info in store.index.storage_data.items():
        if index.fqn in places:
            places[index.fqn][tuple(index.offset or ())] = info
    pieces: dict[str, list[Piece]] = {}
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
            pieces[key].append(Piece(key, offset, tuple(chunk.sizes), places[key][offset]))
    return pieces


def without_padding(pieces: Sequence[Piece]) -> list[Piece]:
    """Drop the pieces of a bucket that lie between its parameters.

    This padding is uninitialised memory (torch.empty, core/optimizer/distrib_optimizer.py:1920,
    0.19.2), and the checkpoint does not mark it. Parameters begin at multiples of 64
    (core/distributed/param_and_grad_buffer.py), so a piece that begins elsewhere is padding, unless
    a rank's shard begins there. In that case the elements up to the next multiple are padding or
    the end of a parameter. The two cannot be distinguished, so they are dropped.
    """
    kept: list[Piece] = []
    before: Piece | None = None
    for piece in sorted(pieces, key=lambda p: p.offset):
        (begin,), (size,) = piece.offset, piece.shape
        shard_begins = before is None or writer_of(before) != writer_of(piece)
        to_the_next = size < ALIGNMENT and (begin + size) % ALIGNMENT == 0
        if begin % ALIGNMENT == 0 or (shard_begins and not to_the_next):
            kept.append(piece)
        before = piece
    return kept


def writer_of(piece: Piece) -> str:
    """Return the rank that wrote a piece: files are named ``__RANK_NUMBER.distcp``."""
    return str(piece.info.relative_path).lstrip("_").partition("_")[0]


def _place(file: BinaryIO, piece: Piece) -> placeholders.TensorPlace:
    place = torch_file.find_tensor(file)
    if place.shape == piece.shape and len(place.stride) == len(place.shape):
        return place
    dense = placeholders.row_major(place.shape)
    if math.prod(place.shape) != math.prod(piece.shape) or place.stride != dense:
        raise ValueError(f"{piece.key}: shape {place.shape} where .metadata says {piece.shape}")
    # A range of a flattened shard (fully_sharded_model_space) may lack the leading ones.
    return place._replace(shape=piece.shape, stride=placeholders.row_major(piece.shape))


def slabs(store: Store, piece: Piece, progress: Progress | None) -> Iterator[torch.Tensor]:
    """Yield all elements of a piece in float64, flat, in parts of at most `SLAB_BYTES`."""
    if 0 in piece.shape:
        return
    with store.open(piece.info, piece.key) as file:
        place = _place(file, piece)
        for low, high in _boxes(place, (0,) * len(piece.shape), piece.shape):
            values = _read_box(file, place, low, high)
            yield values.to(torch.float64).reshape(-1)
            if progress is not None:
                progress(values.numel() * place.dtype.itemsize)


def whole(store: Store, piece: Piece) -> torch.Tensor:
    """Read all elements of an item at once, flat and in the stored dtype."""
    if 0 in piece.shape:
        return torch.empty(0)
    with store.open(piece.info, piece.key) as file:
        return _read_box(file, _place(file, piece), (0,) * len(piece.shape), piece.shape).reshape(
            -1
        )


def _boxes(
    place: placeholders.TensorPlace, low: Sequence[int], high: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a box of a piece until the bytes from its first to its last element fit into a slab."""
    if _span(place, low, high) * place.dtype.itemsize <= SLAB_BYTES:
        yield tuple(low), tuple(high)
        return
    # Cut the dimension with the largest extent in the file, not always the first.
    extents = [(h - 1 - at) * s for at, h, s in zip(low, high, place.stride, strict=True)]
    axis = extents.index(max(extents))
    middle = (low[axis] + high[axis]) // 2
    yield from _boxes(place, low, (*high[:axis], middle, *high[axis + 1 :]))
    yield from _boxes(place, (*low[:axis], middle, *low[axis + 1 :]), high)


def _span(place: placeholders.TensorPlace, low: Sequence[int], high: Sequence[int]) -> int:
    """Count the elements from the first of a box to its last, in the order of the file."""
    return 1 + sum((h - 1 - at) * s for at, h, s in zip(low, high, place.stride, strict=True))


def _read_box(
    file: BinaryIO, place: placeholders.TensorPlace, low: Sequence[int], high: Sequence[int]
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


def slab_pairs(
    store_a: Store,
    pieces_a: Sequence[Piece],
    store_b: Store,
    pieces_b: Sequence[Piece],
    progress: Progress | None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the same parts of a tensor in two checkpoints, which may be cut differently."""
    by_cut = {(p.key, p.offset, p.shape): p for p in pieces_b}
    for a in pieces_a:
        alike = by_cut.get((a.key, a.offset, a.shape))
        for b in [p for p in pieces_b if p.key == a.key] if alike is None else (alike,):
            yield from _common_slabs(store_a, a, store_b, b, progress)


def _common_slabs(
    store_a: Store, a: Piece, store_b: Store, b: Piece, progress: Progress | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the overlap of two pieces of a tensor, flat and in float64."""
    low = tuple(map(max, a.offset, b.offset))
    high = tuple(map(min, _plus(a.offset, a.shape), _plus(b.offset, b.shape)))
    if any(begin >= end for begin, end in zip(low, high, strict=True)):
        return
    with store_a.open(a.info, a.key) as file_a, store_b.open(b.info, b.key) as file_b:
        place_a, place_b = _place(file_a, a), _place(file_b, b)
        for box in _boxes(place_a, _minus(low, a.offset), _minus(high, a.offset)):
            there = [_minus(_plus(corner, a.offset), b.offset) for corner in box]
            # Cut further if the same box has a larger extent in the other piece.
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
