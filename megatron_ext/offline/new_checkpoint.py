"""Write a new checkpoint directory, file by file."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.store import INDEX, Store
from ..checkpoint.stored import StoredCheckpoint
from ..errors import CheckpointError
from . import copying


@dataclass(frozen=True)
class Written:
    """What a conversion has written.

    Args:
        reshaped: Number of tensors reassembled from ranges or buckets.
        copied: Number of tensors and objects copied unchanged.
        size: Bytes written to the store.
        differing: Parameters of which two ranks of the run that wrote the checkpoint held copies
            that are not equal. The copy of the first rank was taken, as Megatron's own save does.
        lost: Parameters and the number of their elements that a shifted save had overwritten. Their
            moments are 0, their master weights the model's weights.
        reset: Parameters of which a shifted save does not tell for certain where they are stored.
            All their moments are 0, their master weights the model's weights.
    """

    reshaped: int
    copied: int
    size: int
    differing: tuple[str, ...] = ()
    lost: tuple[tuple[str, int], ...] = ()
    reset: tuple[str, ...] = ()


def require_new(target: Path, stored: StoredCheckpoint) -> None:
    """Check that a new checkpoint directory can be created.

    Args:
        target: The new directory.
        stored: The checkpoint that will be copied.

    Raises:
        CheckpointError: The target exists, its parent is missing, or it lies in the checkpoint.
    """
    if target.is_symlink() or (target.exists() and not _is_empty(target)):
        raise CheckpointError(f"{target} exists: choose a new directory")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} does not exist: make it, or choose another target")
    if target.parent.resolve().is_relative_to(stored.root.resolve()):
        raise CheckpointError(f"{target} lies in the checkpoint itself: choose another target")


def copy_others(source: Path, target: Path, known: set[str]) -> None:
    """Copy all files of an iteration that are not in `known`.

    Raises:
        CheckpointError: See `megatron_ext.offline.copying.files_of`.
    """
    for name in copying.files_of(source, source):
        if str(name) not in known:
            (target / name).parent.mkdir(exist_ok=True, parents=True)
            copying.copy(source / name, target / name)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


#: The master weights' keys (core/optimizer/distrib_optimizer.py:1694, 0.15.3, and :1814, 0.19.2).
_MASTER = ("optimizer.state.fp32_param.", "optimizer.state.param.")


def reshardable_key(key: str) -> str:
    """Return the key of a tensor in a fully reshardable checkpoint."""
    # "chained_0." may stand before it.
    old, new = _MASTER
    before, found, name = key.partition(old)
    return f"{before}{new}{name}" if found else key


_Change = Callable[[bytes], bytes]


class TensorWriter:
    """Writes a distributed checkpoint's store (torch/distributed/checkpoint/filesystem.py).

    Args:
        directory: Directory of its files.
        limit: Size in bytes at which a new file is begun.
    """

    def __init__(self, directory: Path, limit: int) -> None:
        self._directory = directory
        self._limit = limit
        self._entries: dict[str, Any] = {}
        self._places: dict[Any, Any] = {}
        self._number, self._offset = 0, 0
        self.size = 0

    def copy(
        self, store: Store, key: str, entry: Any, pieces: Iterable[Any], change: _Change = bytes
    ) -> None:
        """Copy a tensor or an object; `change` is called with the bytes of each piece."""
        from torch.distributed.checkpoint import metadata

        name = reshardable_key(key)
        for offset, info in pieces:
            self.add(name, offset, change(store.read(info, key)))
        if hasattr(entry, "size"):
            chunks = [(c.offsets, c.sizes) for c in entry.chunks]
            self.describe(name, entry.properties, entry.size, chunks)
        else:
            self._entries[name] = metadata.BytesStorageMetadata()

    def add(self, key: str, offset: tuple[int, ...] | None, data: bytes | memoryview) -> None:
        """Write one item, which begins at `offset` in the global tensor."""
        from torch.distributed.checkpoint import filesystem, metadata

        if self._offset and self._offset + len(data) > self._limit:
            self._number, self._offset = self._number + 1, 0
        name = f"__{self._number}_0.distcp"
        with (self._directory / name).open("ab") as file:
            file.write(data)
        info = filesystem._StorageInfo(name, self._offset, len(data))
        self._places[metadata.MetadataIndex(key, offset)] = info
        self._offset += len(data)
        self.size += len(data)

    def describe(
        self, key: str, properties: Any, shape: Iterable[int], chunks: Iterable[tuple[Any, Any]]
    ) -> None:
        """Add a tensor to the index; the `Placeholder` `properties` holds the dtype first."""
        from torch.distributed.checkpoint import metadata

        self._entries[key] = metadata.TensorStorageMetadata(
            properties=metadata.TensorProperties(dtype=properties.placeholder_state[0]),
            size=torch.Size(shape),
            chunks=[
                metadata.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                for offsets, sizes in chunks
            ],
        )

    def finish(self) -> None:
        """Write the index."""
        from torch.distributed.checkpoint.metadata import Metadata

        index = Metadata(state_dict_metadata=self._entries, storage_data=self._places)
        (self._directory / INDEX).write_bytes(pickle.dumps(index))
