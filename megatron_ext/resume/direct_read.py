"""Read tensors of a torch_dist checkpoint from the file into their target in one copy.

torch's reader (``FileSystemReader.read_data``, torch/distributed/checkpoint/filesystem.py:869,
2.15) loads every stored tensor into new memory and copies it from there. This module reads the
bytes of a plain tensor directly into a plain target in host memory, in the order of the file.
torch's reader reads everything else and raises its own errors: targets in GPU memory, another
dtype or other strides, a range of columns, a transform, compressed or big-endian records, objects,
and damaged files.

With ``fully_reshardable``, and without a distributed optimizer, Megatron reads the optimizer state
into host memory on GPU machines too (core/optimizer/distrib_optimizer.py:1690, 0.19.2).
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..checkpoint import checksums, placeholders, torch_file
from ..checkpoint.store import unreadable
from ..errors import MegatronExtError

#: Bytes that are requested before they are needed.
_AHEAD = 32 << 20


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turn the error of a read into one that names the file."""
    try:
        yield
    except MegatronExtError:
        raise
    except Exception as e:  # a damaged file may raise any exception
        raise unreadable(path, e) from e


def by_file(reader: Any, items: Sequence[Any]) -> dict[str, list[Any]]:
    """Return the items of each file of the store, by its path."""
    found: dict[str, list[Any]] = defaultdict(list)
    for item in items:
        found[reader.storage_data[item.storage_index].relative_path].append(item)
    return found


def read_in_place(
    reader: Any, items: Sequence[Any], planner: Any, *, verify: bool = False
) -> list[Any]:
    """Read the items that can be read in place.

    Args:
        reader: torch's FileSystemReader.
        items: Items of a load plan.
        planner: Resolves their targets.
        verify: Whether the CRC32 of the tensors is compared.

    Returns:
        The other items, in their order.

    Raises:
        CheckpointError: A file is missing, or a CRC32 differs.
    """
    places = _Places(verify=verify)
    done: set[int] = set()
    for path, found in by_file(reader, items).items():
        found.sort(key=lambda item: reader.storage_data[item.storage_index].offset)
        with (
            named(Path(reader.path) / path),
            reader.fs.create_stream(reader.fs.concat_path(reader.path, path), "rb") as stream,
        ):
            size = stream.seek(0, io.SEEK_END)
            ahead = _Ahead(stream)
            for item in found:
                stored = reader.storage_data[item.storage_index]
                ahead.of(stored.offset + stored.length)
                if stored.offset + stored.length > size:
                    continue
                with contextlib.suppress(_NotPlain):
                    _read_one(stream, stored, item, planner, places)
                    done.add(id(item))
    return [item for item in items if id(item) not in done]


class _Ahead:
    """Lets the kernel prefetch the next bytes while the bytes before them are copied.

    Args:
        stream: A file of the store. Prefetching is skipped if it has no OS file descriptor.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._until = stream, 0

    def of(self, position: int) -> None:
        """Request the bytes up to `_AHEAD` bytes beyond a position."""
        until = position + _AHEAD
        if until - self._until < _AHEAD // 2:
            return
        begin = max(self._until, position - _AHEAD)
        with contextlib.suppress(OSError, AttributeError, io.UnsupportedOperation):
            os.posix_fadvise(self._stream.fileno(), begin, until - begin, os.POSIX_FADV_WILLNEED)
        self._until = until


class _NotPlain(Exception):
    """An item that torch's reader has to read. It overwrites the whole target."""


class _Places:
    """The places of the elements of stored tensors.

    A checkpoint has many tensors of few shapes. Archives of one shape are identical up to their
    elements (the checksum follows the elements), so that one archive of each shape is parsed.

    Args:
        verify: Whether to parse every archive, for its CRC32.
    """

    def __init__(self, *, verify: bool = False) -> None:
        self.verify = verify
        self._known: dict[int, list[tuple[bytes, placeholders.TensorPlace]]] = defaultdict(list)

    def find(self, stream: BinaryIO, offset: int, length: int) -> placeholders.TensorPlace:
        """Find the elements of a tensor as `megatron_ext.checkpoint.torch_file.find_tensor` does.

        Args:
            stream: A file of the store.
            offset: Position of the tensor's archive in the file, in bytes.
            length: Length of the archive in bytes.
        """
        known = self._known[length]
        if known and not self.verify:
            stream.seek(offset)
            begin = stream.read(max(len(b) for b, _ in known))
            for before, place in known:
                if begin.startswith(before):
                    return place
        place = torch_file.find_tensor(torch_file.window(stream, offset, length))
        stream.seek(offset)
        known.append((stream.read(place.start), place))
        return place


def _read_one(stream: BinaryIO, stored: Any, item: Any, planner: Any, places: _Places) -> None:
    """Read one item.

    Raises:
        _NotPlain: The item cannot be read in place, or the file is too short.
    """
    from torch.distributed.checkpoint.planner import LoadItemType

    if item.type != LoadItemType.TENSOR or getattr(stored, "transform_descriptors", None):
        raise _NotPlain
    try:
        place = places.find(stream, stored.offset, stored.length)
    except Exception as e:  # a damaged or foreign file may raise any exception
        raise _NotPlain from e
    first = first_element(place, item.storage_offsets, item.lengths)
    if first is None:
        raise _NotPlain
    target = planner.resolve_tensor(item).detach()
    if not _can_hold(target, place.dtype, item.lengths):
        raise _NotPlain
    if target.numel():
        stream.seek(stored.offset + place.start + first * place.dtype.itemsize)
        into = memoryview(target.view(-1).view(torch.uint8).numpy())
        _fill(stream, into)
        if places.verify:
            _require_sum(stream, stored, place, into)
    planner.commit_tensor(item, target)


def _require_sum(
    stream: BinaryIO, stored: Any, place: placeholders.TensorPlace, read: memoryview
) -> None:
    """Compare the CRC32 of a tensor; all of its storage is read if the target takes a part.

    Raises:
        BadZipFile: It differs.
    """
    if len(read) != place.end - place.start:
        checksums.require_item_sums(stream, stored)
    elif (found := zlib.crc32(read)) != place.crc32:
        raise zipfile.BadZipFile(
            f"Bad CRC-32 for a tensor: expected {place.crc32:08x}, found {found:08x}"
        )


def first_element(
    place: placeholders.TensorPlace, offsets: Sequence[int], lengths: Sequence[int]
) -> int | None:
    """Find the first element of a contiguous part of a stored tensor.

    Args:
        place: The stored tensor.
        offsets: Offset of the part in each dimension, in elements.
        lengths: Size of the part in each dimension, in elements.

    Returns:
        Number of elements before it in the tensor. None if the part is not contiguous or not
        completely stored.
    """
    shape, count = place.shape, math.prod(place.shape)
    row_major = placeholders.row_major(shape)
    strides = zip(shape, place.stride, row_major, strict=True)
    if any(size > 1 and stride != wanted for size, stride, wanted in strides):
        return None
    if place.end - place.start < count * place.dtype.itemsize or len(lengths) != len(shape):
        return None
    # The part is contiguous if it has one element in each dimension before the last cut one.
    cut = [i for i, size in enumerate(shape) if lengths[i] != size]
    if cut and any(n != 1 for n in lengths[: cut[-1]]):
        return None
    if any(o < 0 or o + n > size for o, n, size in zip(offsets, lengths, shape, strict=True)):
        return None
    return sum(o * stride for o, stride in zip(offsets, row_major, strict=True))


def _can_hold(target: Any, dtype: torch.dtype, shape: Sequence[int]) -> bool:
    """Whether the target's memory holds the stored bytes unchanged."""
    return (
        type(target) in (torch.Tensor, torch.nn.Parameter)
        and target.device.type == "cpu"
        and target.layout == torch.strided
        and target.dtype == dtype
        and tuple(target.shape) == tuple(shape)
        and target.is_contiguous()
        and not (target.is_conj() or target.is_neg())
    )


def _fill(stream: BinaryIO, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = stream.readinto(into[done:])  # type: ignore[attr-defined]
        if not count:
            raise _NotPlain
        done += count
