"""Read pickles without running them: unknown classes become placeholders."""

from __future__ import annotations

import argparse
import collections
import contextlib
import gc
import io
import math
import pickle
import struct
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from .placeholders import IndexPlaceholder, Inert, StoragePlace, TensorPlaceholder

_PLANS = b"all_local_plans"
#: Opcode and length (pickletools: FRAME).
_FRAME = struct.Struct("<cQ")
_FRAME_OPCODE = b"\x95"


def load(file: BinaryIO) -> Any:
    """Unpickle, running nothing.

    Args:
        file: The pickle.

    Raises:
        Exception: Whatever a damaged pickle makes of itself.
    """
    with without_collection():
        return Unpickler(file).load()


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


class Unpickler(pickle.Unpickler):
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

    def persistent_load(self, pid: Any) -> StoragePlace:
        """``("storage", type, key, location, elements)``."""
        kind, storage_type, key = pid[:3]
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        dtype = _STORAGES.get(storage_type.inert_class.rpartition(".")[2], torch.uint8)
        return StoragePlace(dtype, str(key))

    def _parameter(self, data: Any, *rest: Any) -> Any:
        return data

    def _tensor(self, storage: StoragePlace, offset: int, size: tuple[int, ...], *rest: Any) -> Any:
        return self._one(storage.key, storage.dtype, offset, size, *rest[:1])

    def _tensor_v3(
        self,
        storage: StoragePlace,
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
        made = TensorPlaceholder()
        made.__setstate__({"shape": tuple(size), "dtype": dtype})
        if value is not None:
            made.__setstate__({"value": value})
        return made


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
    IndexPlaceholder.inert_class: IndexPlaceholder,
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    **{f"builtins.{t.__name__}": t for t in (set, frozenset, bytearray, complex, slice, range)},
    **{f"__builtin__.{t.__name__}": t for t in (set, frozenset, bytearray, complex, slice)},
    "__builtin__.xrange": range,
}
