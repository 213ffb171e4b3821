"""Verify a whole checkpoint: files, index, CRC32 of every item, values, and master weights.

Every item is read once, in parts. The exception are master weights that are cut into other pieces
than the weights: both are read again to compare them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..checkpoint import index_fit
from ..checkpoint.state_keys import parse_state_key, state_dtype
from ..checkpoint.store import COMMON, Store, read_file
from ..checkpoint.stored import StoredCheckpoint
from ..errors import CheckpointError
from . import master_proof, slabs
from .master_proof import Compared, MasterProof
from .slabs import Piece, Progress
from .stored_items import storage_parts, tensor_parts
from .verified import Damage, Findings, Verification


def total_bytes(stored: StoredCheckpoint) -> int:
    """Compute how many bytes `verify` reads."""
    items = () if stored.store is None else stored.store.index.storage_data.values()
    return sum(map(_size, _whole_files(stored))) + sum(info.length for info in items)


def verify(stored: StoredCheckpoint, progress: Progress | None = None) -> Verification:
    """Read a whole checkpoint in bounded memory and check everything that it stores.

    Args:
        stored: The checkpoint.
        progress: Called with the number of bytes just read; their sum is `total_bytes`.
    """
    found, masters = Findings(), MasterProof(0)
    for path in _whole_files(stored):
        _read_whole(path, path.relative_to(stored.directory).as_posix(), found)
        if progress is not None:
            progress(_size(path))
    if stored.store is not None:
        with _noted(found, index_fit.INDEX, ""):
            stored.store.require_whole_index()
        index = stored.store.index
        for problem in (
            *index_fit.problems(stored.directory, index),
            *index_fit.more_problems(index),
        ):
            said = f"expected {problem.expected}, found {problem.found}"
            found.damages.append(Damage(problem.file, "", said))
        masters = master_proof.conclude(
            _Reader(stored, stored.store, found).read(progress), stored.args
        )
    return found.result(str(stored.directory), masters, tuple(_notes(stored)))


def _notes(stored: StoredCheckpoint) -> Iterator[str]:
    if stored.optimizers and not master_proof.masters_of(stored):
        kind = stored.sharding_type or f"the format {stored.format}"
        halves = f", and {master_proof.ONLY_HALF}" if master_proof.has_remainders(stored) else ""
        yield (
            f"the master weights were not compared: {kind} does not store them by parameter{halves}"
        )


def _whole_files(stored: StoredCheckpoint) -> list[Path]:
    """List the files of torch.save that are no store: common.pt, or those of legacy torch."""
    if stored.store is None:
        return sorted({*stored.legacy_files(), *stored.directory.glob("mp_rank_*/*.pt")})
    return [path] if (path := stored.directory / COMMON).is_file() else []


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _read_whole(path: Path, name: str, found: Findings) -> None:
    def read(file: BinaryIO) -> None:
        _count_object(file, name, found)

    with _noted(found, name, ""):
        read_file(path, read)
    found.add_item(name, _size(path))


def _count_object(file: BinaryIO, name: str, found: Findings) -> None:
    for path, part in storage_parts(file):
        found.count(f"{name}: {path}", path.rpartition(".")[2], part)


@contextlib.contextmanager
def _noted(found: Findings, file: str, item: str) -> Iterator[None]:
    """Keep the error of an item, and go on with the next one."""
    try:
        yield
    except CheckpointError as e:
        cause = e.__cause__
        ours = cause is None or type(cause) is ValueError
        found.damages.append(
            Damage(file, item, str(cause or e) if ours else f"{type(cause).__name__}: {cause}")
        )


class _Reader:
    """Reads the items of a store in the order of its files.

    Args:
        stored: The checkpoint.
        store: Its files.
        found: Gets what is found.
    """

    def __init__(self, stored: StoredCheckpoint, store: Store, found: Findings) -> None:
        self._store, self._found = store, found
        self._entries = store.index.state_dict_metadata
        self._pieces = self._find_pieces()
        self._padding = {
            (piece.key, piece.offset)
            for key, pieces in self._pieces.items()
            if (parsed := parse_state_key(key)) is not None and parsed.bucket
            for piece in _dropped(pieces)
        }
        #: Key of weights -> the tensor of master weights that is cut alike, and the reverse.
        self._partners: dict[str, str] = {}
        #: Master weights that are cut into other pieces -> the weights.
        self._apart: dict[str, str] = {}
        self._compared: dict[str, Compared] = {}
        for master, weight in master_proof.masters_of(stored).items():
            if state_dtype(self._entries[weight]) in master_proof.ROUNDED:
                self._compared[weight] = Compared(weight)
                self._pair(master, weight)

    def read(self, progress: Progress | None) -> Iterable[Compared]:
        """Read every item; return the comparison of the master weights."""
        items = sorted(
            self._store.index.storage_data.items(),
            key=lambda item: (item[1].relative_path, item[1].offset),
        )
        done: set[tuple[str, tuple[int, ...]]] = set()
        for item, info in items:
            key, offset = item.fqn, tuple(item.offset or ())
            if (key, offset) in done:
                continue
            piece = self._pieces.get(key, {}).get(offset)
            read = [info]
            if piece is None:
                self._object(key, info)
            elif (partner := self._partners.get(key)) is None:
                for _ in self._parts(piece):
                    pass
            else:
                other = self._pieces[partner][offset]
                done.add((partner, offset))
                read.append(other.info)
                self._compare(piece, other)
            for one in read:
                self._found.add_item(str(one.relative_path), one.length)
                if progress is not None:
                    progress(one.length)
        for master, weight in self._apart.items():
            self._compare_apart(master, weight)
        return self._compared.values()

    def _find_pieces(self) -> dict[str, dict[tuple[int, ...], Piece]]:
        sizes = {
            key: {tuple(c.offsets): tuple(c.sizes) for c in entry.chunks}
            for key, entry in self._entries.items()
            if hasattr(entry, "size")
        }
        pieces: dict[str, dict[tuple[int, ...], Piece]] = {key: {} for key in sizes}
        for item, info in self._store.index.storage_data.items():
            offset = tuple(item.offset or ())
            if offset in (of_key := sizes.get(item.fqn, {})):
                pieces[item.fqn][offset] = Piece(item.fqn, offset, of_key[offset], info)
        return pieces

    def _pair(self, master: str, weight: str) -> None:
        cut = [{p.offset: p.shape for p in self._pieces[key].values()} for key in (master, weight)]
        if cut[0] == cut[1] and weight not in self._partners:
            self._partners[master], self._partners[weight] = weight, master
        else:
            self._apart[master] = weight

    def _object(self, key: str, info: Any) -> None:
        file = str(info.relative_path)
        with _noted(self._found, file, key), self._store.open(info, key) as opened:
            _count_object(opened, key, self._found)

    def _parts(self, piece: Piece) -> Iterator[torch.Tensor]:
        """Yield the elements of a piece and count them; a damage ends it."""
        parsed = parse_state_key(piece.key)
        dtype = state_dtype(self._entries[piece.key])
        with (
            _noted(self._found, str(piece.info.relative_path), piece.key),
            self._store.open(piece.info, piece.key) as opened,
        ):
            for part in tensor_parts(opened, piece.shape):
                if part.dtype != dtype:
                    raise ValueError(f"elements of {part.dtype}; the index says {dtype}")
                if (piece.key, piece.offset) not in self._padding:
                    self._found.count(piece.key, "" if parsed is None else parsed.state, part)
                yield part

    def _compare(self, piece: Piece, other: Piece) -> None:
        """Read a piece of weights and the same piece of master weights side by side."""
        of_weights = piece.key in self._compared
        weight, master = (piece, other) if of_weights else (other, piece)
        parts = self._parts(master), self._parts(weight)
        for x, y in zip(*parts, strict=False):
            self._add(weight.key, x, y)
        for rest in parts:  # a damage has ended one of them
            for _ in rest:
                pass

    def _compare_apart(self, master: str, weight: str) -> None:
        dtype = state_dtype(self._entries[weight])
        weights = [dataclasses.replace(p, key=master) for p in self._pieces[weight].values()]
        masters = list(self._pieces[master].values())
        with contextlib.suppress(CheckpointError):  # noted when the item itself was read
            for x, y in slabs.slab_pairs(self._store, masters, self._store, weights, None):
                self._add(weight, x, y.to(dtype))

    def _add(self, weight: str, x: torch.Tensor, y: torch.Tensor) -> None:
        self._compared[weight] = master_proof.compared_with(self._compared[weight], x, y)


def _dropped(pieces: dict[tuple[int, ...], Piece]) -> list[Piece]:
    """List the pieces of a bucket that are padding."""
    kept = {piece.offset for piece in slabs.without_padding(list(pieces.values()))}
    return [piece for piece in pieces.values() if piece.offset not in kept]
