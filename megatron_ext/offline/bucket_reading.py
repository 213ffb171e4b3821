"""Read the buckets of a ``dp_reshardable`` checkpoint, and the weights beside them."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from ..checkpoint import names
from ..checkpoint.state_keys import parse_state_key, state_dtype
from ..checkpoint.store import INDEX, Store
from ..errors import CheckpointError
from .bucket_edges import ALIGNMENT, Edges
from .bucket_weights import Weight, Weights, fingerprint
from .slabs import Piece, pieces_of, whole, writer_of

#: The name of a bucket (core/optimizer/distrib_optimizer.py:1884, 0.19.2). The first dtype is that
#: of the model's weights, the second that of the gradients.
_BUCKET = re.compile(
    r"dp_group_idx_(?P<group>\d+)\.gbuf_idx_(?P<buffer>\d+)\."
    r"dtype_\(torch\.(?P<dtype>\w+), torch\.\w+\)\.bucket_idx_(?P<number>\d+)"
)
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.bfloat16, torch.float16, torch.float32)}
MASTER = "param"
SAVE_ONCE_MORE = (
    "Load the checkpoint with the configuration that wrote it and save it once more with "
    "--dist-ckpt-optim-fully-reshardable"
)


@dataclass(frozen=True)
class Bucket:
    """A bucket of one model-parallel rank.

    Args:
        chain: Number of the optimizer in its chain.
        group: Number of the model-parallel rank.
        buffer: Number of the buffer.
        number: Number in the buffer.
        dtype: Dtype of the model's weights.
        states: State, such as ``exp_avg`` -> key of its tensor in the store.
    """

    chain: int
    group: int
    buffer: int
    number: int
    dtype: torch.dtype
    states: Mapping[str, str]

    @property
    def place(self) -> tuple[int, int, int, int]:
        """Position among all buckets."""
        return self.chain, self.group, self.buffer, self.number


class Reader:
    """Reads whole buckets, one at a time.

    Args:
        store: The checkpoint's store.
        buckets: Its buckets.
    """

    def __init__(self, store: Store, buckets: Iterable[Bucket]) -> None:
        self._store = store
        self._pieces = pieces_of(store, {key for b in buckets for key in b.states.values()})

    def edges(self, key: str) -> Edges:
        """Return how a bucket is cut into stored pieces."""
        pieces = sorted(self._pieces[key], key=lambda p: p.offset)
        bounds = {at for p in pieces for at in (p.offset[0], p.offset[0] + p.shape[0])}
        # Neither a parameter nor a rank's part begins there.
        padding = [
            piece.offset[0]
            for before, piece in itertools.pairwise(pieces)
            if piece.offset[0] % ALIGNMENT and writer_of(before) == writer_of(piece)
        ]
        return Edges(bounds, padding)

    def read(self, key: str) -> torch.Tensor:
        """Read a bucket.

        Raises:
            CheckpointError: The checkpoint is damaged.
        """
        entry = self._store.index.state_dict_metadata[key]
        values, done = torch.empty(entry.size, dtype=state_dtype(entry)), 0
        for piece in sorted(self._pieces[key], key=lambda p: p.offset):
            (begin,), (size,) = piece.offset, piece.shape
            if begin > done:
                break
            # The padding behind the last parameter may be longer than the stored tensor.
            part = values[begin : begin + size]
            part.copy_(whole(self._store, piece)[: len(part)])
            done = max(done, begin + len(part))
        if done < len(values):
            raise CheckpointError(
                f"{self._store.directory / INDEX}: expected pieces of {key} without a gap, found "
                f"none for element {done}. The index is damaged: restore it or load another "
                "iteration"
            )
        return values


def buckets_of(store: Store) -> list[Bucket]:
    """List the buckets of a checkpoint in order.

    Raises:
        CheckpointError: A bucket has an unknown key or not the tensors of the others.
    """
    states: dict[tuple[int, str], dict[str, str]] = defaultdict(dict)
    for key, shape in store.shapes().items():
        found = None if shape is None else parse_state_key(key)
        if found is not None:
            states[found.optimizer or 0, found.name if found.bucket else key][found.state] = key
    buckets = []
    for (chain, name), keys in states.items():
        place = _BUCKET.fullmatch(name)
        if place is None or place["dtype"] not in _DTYPES or MASTER not in keys:
            raise CheckpointError(
                f"{store.directory}: {next(iter(keys.values()))}: expected buckets of bfloat16, "
                f"float16 or float32 weights with their {MASTER}, found this tensor. "
                + SAVE_ONCE_MORE
            )
        group, buffer, number = (int(place[part]) for part in ("group", "buffer", "number"))
        buckets.append(Bucket(chain, group, buffer, number, _DTYPES[place["dtype"]], keys))
    return sorted(buckets, key=lambda b: b.place)


def weights_of(store: Store, style: names.Style) -> Weights:
    """Read the weights of the model, one piece at a time, and keep their fingerprints.

    Args:
        store: The checkpoint's store.
        style: How the model names its parameters, for messages.
    """
    shapes = store.shapes()
    keys = [
        key
        for key, shape in shapes.items()
        if shape is not None and names.kind_and_key(key) == (names.WEIGHTS, key)
    ]
    return Weights(
        _weight(store, piece, style)
        for pieces in pieces_of(store, keys).values()
        for piece in pieces
        if 0 not in piece.shape
    )


def _weight(store: Store, piece: Piece, style: names.Style) -> Weight:
    count = names.leading_axes(piece.key)
    name = names.name_of(piece.key, piece.offset[:count], style)
    values = whole(store, piece)
    return Weight(
        piece.key,
        piece.offset,
        piece.shape,
        name,
        piece.offset[count:],
        values.dtype,
        values.numel(),
        *fingerprint(values),
    )
