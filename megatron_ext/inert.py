"""Reading pickles and ``torch.save`` files without running what is in them, and without tensors.

A pickle names callables and says what to call them with. Here a name that is not on a short list of
harmless ones becomes a stand-in class: what would have been constructed is an `Inert` that keeps
arguments and attributes, and the module it names is never imported. ``torch.load`` will not do:
with ``weights_only`` it refuses such pickles (a Megatron checkpoint has enums among its arguments),
and with a pickle module of one's own it still runs TorchScript archives and unpacks tar files.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch

_ZIP = b"PK\x03\x04"
_PLANS = b"all_local_plans"
#: Opcode and length (pickletools: FRAME).
_FRAME = struct.Struct("<cQ")
_FRAME_OPCODE = b"\x95"


class Inert:
    """Stands for an object of a class that was not imported; equal where the pickles were.

    ``inert_class`` is the class's ``module.name`` and ``inert_arguments`` what it was to be called
    with; the attributes are those of the pickled state, and a state that is no dict is in
    ``inert_state``.
    """

    inert_class = ""
    inert_arguments: tuple[Any, ...] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        """Whatever it is called with."""
        made = object.__new__(cls)
        if args:
            made.__dict__["inert_arguments"] = args
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `__new__` keeps the arguments."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            if self.__dict__:
                self.__dict__.update(state)
            else:  # of an index there are millions
                self.__dict__ = state
        else:
            self.__dict__["inert_state"] = state

    # A pickle may fill a subclass of list or dict item by item.

    def append(self, item: Any) -> None:
        """Keep an item."""
        self.__dict__.setdefault("inert_items", []).append(item)

    def extend(self, items: Any) -> None:
        """Keep items."""
        self.__dict__.setdefault("inert_items", []).extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.append((key, value))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Inert)
            and self.inert_class == other.inert_class
            and self.__dict__ == other.__dict__
        )

    def __hash__(self) -> int:
        return hash((self.inert_class, repr(self.inert_arguments)))

    def __repr__(self) -> str:
        inside = [repr(a) for a in self.inert_arguments]
        inside += [f"{k}={v!r}" for k, v in self.__dict__.items() if k != "inert_arguments"]
        return f"{self.inert_class}({', '.join(inside)})"


class _Index(Inert):
    """torch's MetadataIndex: the key of a dict of up to a million, so hashed by identity."""

    inert_class = "torch.distributed.checkpoint.metadata.MetadataIndex"
    offset: Any = None
    __hash__ = object.__hash__


class TensorPlace(NamedTuple):
    """Where a tensor's elements are in a ``torch.save`` file.

    Args:
        dtype: Of an element.
        shape: In elements.
        stride: In elements.
        start: Byte in the file at which the first element begins.
        end: Byte at which the storage ends.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    end: int


class _Storage(NamedTuple):
    """A tensor's storage in a ``torch.save`` file."""

    dtype: torch.dtype
    key: str


def load(file: BinaryIO) -> Any:
    """Unpickle, running nothing.

    Args:
        file: The pickle.

    Raises:
        Exception: Whatever a damaged pickle makes of itself.
    """
    with without_collection():
        return _Unpickler(file).load()


def load_index(file: BinaryIO) -> Any:
    """Unpickle torch's index of a distributed checkpoint, without the plans of all ranks.

    megatron-core 0.19 keeps them at its end (``all_local_plans``, core/dist_checkpointing/
    strategies/state_dict_saver.py:144); they say once more what the index says and would take as
    long and as much memory as the rest.

    Args:
        file: The pickle; seekable.

    Raises:
        Exception: Whatever a damaged pickle makes of itself.
    """
    with contextlib.suppress(Exception):  # the name may stand for something else
        # The unpickler reads more than an opcode at a time where it can peek.
        data = io.BytesIO(_without_plans(file.read()))
        return load(cast(BinaryIO, io.BufferedReader(cast(Any, data), 1 << 20)))
    file.seek(0)
    return load(file)


def _without_plans(data: bytes) -> bytes:
    """The pickle of an object up to its attribute ``all_local_plans``, and closed there.

    As it is where there is none, or where the pickle does not end as it should: what is cut off
    may not hide that the file is truncated.
    """
    at = max(data.find(opcode + _PLANS) for opcode in (b"\x8c\x0f", b"X\x0f\0\0\0"))
    begins, end = _frames(data)
    if at < 0 or end > len(data) or not data.endswith(b"."):
        return data
    # SETITEMS of the attributes so far, BUILD, STOP.
    closing = b"ub."
    if not begins:
        return data[:at] + closing
    begin = max(b for b in begins if b < at)
    inside = data[begin + _FRAME.size : at] + closing
    return data[:begin] + _FRAME.pack(_FRAME_OPCODE, len(inside)) + inside


def _frames(data: bytes) -> tuple[list[int], int]:
    """Where the frames of a pickle begin (from protocol 4 on), and where the last one ends."""
    begins, end = [], 2
    while data.startswith(_FRAME_OPCODE, end):
        begins.append(end)
        end += _FRAME.size + int(_FRAME.unpack_from(data, end)[1])
    return begins, end


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Of an index's millions of objects none is garbage, and looking takes most of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def load_torch(file: BinaryIO) -> Any:
    """What ``torch.save`` wrote, with 0-dim tensors as numbers and an `Inert` for other tensors.

    Args:
        file: In the zip format; seekable. Of a tensor's elements none are read, but for those of
            one element.

    Returns:
        The object. A tensor is an `Inert` of the class ``torch.Tensor`` with ``shape`` and
        ``dtype``, and ``value`` where it has one element.

    Raises:
        Exception: Whatever a damaged file makes of itself.
    """
    with _archive(file) as archive:
        names = {name.partition("/")[2]: name for name in archive.namelist()}
        if "data.pkl" not in names:
            raise pickle.UnpicklingError("no data.pkl in the zip file")
        big = "byteorder" in names and archive.read(names["byteorder"]) == b"big"

        def element(key: str, offset: int, size: int) -> bytes:
            with archive.open(names[f"data/{key}"]) as record:
                record.seek(offset)
                data = record.read(size)
            return data[::-1] if big else data

        return _Unpickler(io.BytesIO(archive.read(names["data.pkl"])), element).load()


def require_torch_file(file: BinaryIO) -> None:
    """Check that a file begins and ends as ``torch.save`` writes one; no element is read.

    Args:
        file: Seekable.

    Raises:
        Exception: Whatever a damaged file makes of itself.
    """
    with _archive(file) as archive:
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            raise pickle.UnpicklingError("no data.pkl in the zip file")


def find_tensor(file: BinaryIO) -> TensorPlace:
    """Where the elements of the one tensor are that ``torch.save`` wrote, without reading them.

    Args:
        file: In the zip format, not compressed, as torch writes it.

    Raises:
        Exception: Whatever a damaged file makes of itself.
    """
    with _archive(file) as archive:
        entries = {e.filename.partition("/")[2]: e for e in archive.infolist()}
        if "byteorder" in entries and archive.read(entries["byteorder"]) == b"big":
            raise pickle.UnpicklingError("a big-endian tensor")
        found = _TensorFinder(io.BytesIO(archive.read(entries["data.pkl"]))).load()
    if not isinstance(found, _Found):
        raise pickle.UnpicklingError(f"a tensor was expected, found {type(found).__name__}")
    record = entries[f"data/{found.storage}"]
    if record.compress_type != zipfile.ZIP_STORED:
        raise pickle.UnpicklingError("a compressed tensor")
    # The local header is 30 bytes, then a name and padding of the lengths at its end.
    file.seek(record.header_offset + 26)
    begin = record.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
    start = begin + found.offset * found.dtype.itemsize
    return TensorPlace(found.dtype, found.shape, found.stride, start, begin + record.file_size)


def _archive(file: BinaryIO) -> zipfile.ZipFile:
    """The zip file that ``torch.save`` writes.

    Raises:
        UnpicklingError: It is another file, or one in the format of torch 1.5 and earlier.
    """
    start = file.read(len(_ZIP))
    file.seek(0)
    if start != _ZIP:
        raise pickle.UnpicklingError("not in the zip format that torch.save writes since torch 1.6")
    return zipfile.ZipFile(file)


class _Found(NamedTuple):
    """A tensor as its pickle says: the storage's key and the offset there, in elements."""

    storage: str
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def window(file: BinaryIO, offset: int, length: int) -> BinaryIO:
    """A part of a file as a file.

    Args:
        file: Seekable; nothing else may use it meanwhile.
        offset: Where the part begins, in bytes.
        length: Of the part, in bytes.
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


class _Unpickler(pickle.Unpickler):
    """`pickle.Unpickler` that knows nothing but `_HARMLESS`, torch's dtypes and `Inert`.

    Args:
        file: The pickle.
        element: Reads bytes of a storage: key, offset and size in bytes.
    """

    def __init__(
        self, file: BinaryIO, element: Callable[[str, int, int], bytes] | None = None
    ) -> None:
        super().__init__(file)
        self._element = element

    def find_class(self, module: str, name: str) -> Any:
        """The harmless object of this name, or a stand-in class."""
        path = f"{module}.{name}"
        # Looked up each time: an unpickler that refers to itself would stay until a collection,
        # and with it its file and everything that an index's objects were made from.
        if path in _REBUILD:
            return getattr(self, _REBUILD[path])
        known = _HARMLESS.get(path)
        if known is not None:
            return known
        if module == "torch" and isinstance(constant := getattr(torch, name, None), torch.dtype):
            return constant
        return type(name.rpartition(".")[2], (Inert,), {"inert_class": path})

    def persistent_load(self, pid: Any) -> _Storage:
        """``("storage", type, key, location, elements)``."""
        kind, storage_type, key = pid[:3]
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        dtype = _STORAGES.get(storage_type.inert_class.rpartition(".")[2], torch.uint8)
        return _Storage(dtype, str(key))

    def _parameter(self, data: Any, *rest: Any) -> Any:
        return data

    def _tensor(self, storage: _Storage, offset: int, size: tuple[int, ...], *rest: Any) -> Any:
        return self._one(storage.key, storage.dtype, offset, size, *rest[:1])

    def _tensor_v3(
        self,
        storage: _Storage,
        offset: int,
        size: tuple[int, ...],
        stride: Any,
        requires_grad: bool,
        hooks: Any,
        dtype: torch.dtype,
        *rest: Any,
    ) -> Any:
        return self._one(storage.key, dtype, offset, size, stride)

    def _one(
        self, key: str, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: Any = None
    ) -> Any:
        value = None
        if self._element is not None and math.prod(size) == 1:
            data = self._element(key, offset * dtype.itemsize, dtype.itemsize)
            value = torch.frombuffer(bytearray(data), dtype=dtype, count=1).item()
            if not len(size):
                return value
        made = _Tensor()
        made.__setstate__({"shape": tuple(size), "dtype": dtype})
        if value is not None:
            made.__setstate__({"value": value})
        return made


class _TensorFinder(_Unpickler):
    """Keeps what says where a tensor's elements are."""

    def _one(
        self, key: str, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: Any = None
    ) -> Any:
        return _Found(key, offset, dtype, tuple(size), tuple(stride))


class _Tensor(Inert):
    inert_class = "torch.Tensor"


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Bytes in pickles of protocol 2: text in latin1. Other codecs decompress."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
    return text.encode("latin1")


def _numpy_scalar(dtype: Any, data: bytes) -> Any:
    """A numpy scalar as a plain number; `dtype` is an `Inert`."""
    code, order = dtype.inert_arguments[0], dtype.inert_state[1]
    if code.rstrip("0123456789") not in ("i", "u", "f", "b", "c"):
        raise pickle.UnpicklingError(f"a numpy scalar of dtype {code}")
    return np.frombuffer(data, dtype=order.replace("|", "") + code)[0].item()


#: What makes a tensor -> the method of `_Unpickler` that stands for it.
_REBUILD = {
    "torch._utils._rebuild_tensor": "_tensor",
    "torch._utils._rebuild_tensor_v2": "_tensor",
    "torch._utils._rebuild_tensor_v3": "_tensor_v3",
    "torch._utils._rebuild_parameter": "_parameter",
}

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}

_HARMLESS: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": argparse.Namespace,
    "types.SimpleNamespace": argparse.Namespace,
    "collections.OrderedDict": collections.OrderedDict,
    "pathlib.PosixPath": PurePosixPath,
    "pathlib.PurePosixPath": PurePosixPath,
    "pathlib._local.PosixPath": PurePosixPath,
    "pathlib.WindowsPath": PureWindowsPath,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    _Index.inert_class: _Index,
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    **{f"builtins.{t.__name__}": t for t in (set, frozenset, bytearray, complex, slice, range)},
    **{f"__builtin__.{t.__name__}": t for t in (set, frozenset, bytearray, complex, slice)},
    "__builtin__.xrange": range,
}
