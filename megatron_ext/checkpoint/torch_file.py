"""Read files of `torch.save` without running their pickles, and locate a tensor in one."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from typing import Any, BinaryIO, NamedTuple, cast

import torch

from .bounded import require_bounded, require_shapes
from .pickles import Unpickler, gc_disabled
from .placeholders import TensorPlace

_ZIP = b"PK\x03\x04"
#: Bytes of the largest pickle in a file; it has no elements of tensors.
_LARGEST = 1 << 26


def load_torch(file: BinaryIO) -> Any:
    """Read an object that ``torch.save`` wrote, without the elements of its tensors.

    Args:
        file: In the zip format; seekable. Only tensors of one element are read.

    Returns:
        The object. A tensor of no dimension is a number. Other tensors are a `TensorPlaceholder`
        with ``shape`` and ``dtype``, and with ``value`` if they have one element.

    Raises:
        Exception: A damaged file may raise any exception.
    """
    with _archive(file) as archive:
        entries = {e.filename.partition("/")[2]: e for e in archive.infolist()}
        big = "byteorder" in entries and _read(archive, entries["byteorder"]) == b"big"

        def element(key: str, offset: int, size: int) -> bytes:
            record = entries[f"data/{key}"]
            if offset + size > record.file_size:
                raise pickle.UnpicklingError(f"data/{key} ends before its element")
            file.seek(_begin(file, record) + offset)
            data = file.read(size)
            return data[::-1] if big else data

        data = _read_pickle(archive)
        with gc_disabled():
            found = Unpickler(io.BytesIO(data), element).load()
    require_bounded(found)
    return found


def require_torch_file(file: BinaryIO) -> None:
    """Check that a file begins and ends as ``torch.save`` writes it, and the CRC32 of its pickle.

    Args:
        file: Seekable. No tensor is read.

    Raises:
        Exception: A damaged file may raise any exception.
    """
    with _archive(file) as archive:
        _read_pickle(archive)


def find_tensor(file: BinaryIO) -> TensorPlace:
    """Locate the elements of the one tensor in a ``torch.save`` file, without reading them.

    Args:
        file: In the zip format, not compressed, as torch writes it.

    Raises:
        Exception: A damaged file may raise any exception.
    """
    with _archive(file) as archive:
        entries = {e.filename.partition("/")[2]: e for e in archive.infolist()}
        if "byteorder" in entries and _read(archive, entries["byteorder"]) == b"big":
            raise pickle.UnpicklingError("a big-endian tensor")
        found = _TensorFinder(io.BytesIO(_read_pickle(archive))).load()
    if not isinstance(found, _Found):
        raise pickle.UnpicklingError(f"a tensor was expected, found {type(found).__name__}")
    require_shapes(found.shape, found.stride, (found.offset,))
    record = entries[f"data/{found.storage}"]
    begin = _begin(file, record)
    start = begin + found.offset * found.dtype.itemsize
    end = begin + record.file_size
    return TensorPlace(found.dtype, found.shape, found.stride, start, end, record.CRC)


def _read_pickle(archive: zipfile.ZipFile) -> bytes:
    for entry in archive.infolist():
        if entry.filename.partition("/")[2] == "data.pkl":
            return _read(archive, entry)
    raise pickle.UnpicklingError("no data.pkl in the zip file")


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Read a small record; what it claims to be is what it takes in the file."""
    _require_stored(entry)
    if entry.file_size > _LARGEST:
        raise pickle.UnpicklingError(
            f"{entry.filename} of {entry.file_size} bytes; expected at most {_LARGEST}"
        )
    return archive.read(entry)


def _begin(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Return the offset of a record's content, in bytes."""
    _require_stored(entry)
    # The local header is 30 bytes, then a name and padding of the lengths at its end.
    file.seek(entry.header_offset + 26)
    return entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))


def _require_stored(entry: zipfile.ZipInfo) -> None:
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise pickle.UnpicklingError(f"{entry.filename} is compressed; torch.save compresses none")


def _archive(file: BinaryIO) -> zipfile.ZipFile:
    """Open the zip file that ``torch.save`` writes.

    Raises:
        UnpicklingError: It is another file, or in the format of torch 1.5 and earlier.
    """
    start = file.read(len(_ZIP))
    file.seek(0)
    if start != _ZIP:
        raise pickle.UnpicklingError("not in the zip format that torch.save writes since torch 1.6")
    return zipfile.ZipFile(file)


class _Found(NamedTuple):
    """A tensor as its pickle describes it; ``offset`` counts elements of the storage."""

    storage: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def window(file: BinaryIO, offset: int, length: int) -> BinaryIO:
    """Present a part of a file as a file.

    Args:
        file: Seekable. Nothing else may use it meanwhile.
        offset: Offset of the part, in bytes.
        length: Length of the part, in bytes.
    """
    return cast(BinaryIO, io.BufferedReader(_Window(file, offset, length), 1 << 16))


class _Window(io.RawIOBase):
    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("seek before the beginning")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._file.seek(self._offset + self._at)
        done: int = self._file.readinto(memoryview(buffer)[:count])  # type: ignore[attr-defined]
        self._at += done
        return done


class _TensorFinder(Unpickler):
    """Unpickle a tensor to its position instead of its elements."""

    def _one(
        self, key: str, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: Any = None
    ) -> Any:
        return _Found(key, offset, dtype, tuple(size), tuple(stride))


def tensors_of(file: BinaryIO) -> dict[str, tuple[str, torch.dtype]]:
    """Locate the storages of all tensors in a ``torch.save`` file, without reading them.

    Args:
        file: In the zip format; seekable.

    Returns:
        Record of the storage, such as ``data/0`` -> path of its first tensor in the object, such as
        ``optimizer.state.0.exp_avg``, and the dtype.

    Raises:
        Exception: A damaged file may raise any exception.
    """
    with _archive(file) as archive:
        found = _TensorFinder(io.BytesIO(_read_pickle(archive))).load()
    out: dict[str, tuple[str, torch.dtype]] = {}
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", found)]
    while left:
        path, value = left.pop()
        if isinstance(value, _Found):
            out.setdefault(f"data/{value.storage}", (path, value.dtype))
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            inside = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{path}.{key}" if path else str(key), v) for key, v in inside][::-1]
    return out
