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

from .placeholders import IndexPlaceholder, Placeholder, StoragePlace, TensorPlaceholder

_PLANS = b"all_local_plans"
#: Opcode and length (pickletools: FRAME).
_FRAME = struct.Struct("<cQ")
_FRAME_OPCODE = b"\x95"


def load(file: BinaryIO) -> Any:
    """Unpickle without running any code of the pickle.

    Args:
        file: The pickle.

    Raises:
        Exception: A damaged pickle may raise any exception.
    """
    with gc_disabled():
        return Unpickler(file).load()


def load_index(file: BinaryIO) -> Any:
    """Unpickle torch's index of a distributed checkpoint, without the plans of all ranks.

    megatron-core 0.19 stores the plans at the end of the index (``all_local_plans``,
    core/dist_checkpointing/strategies/state_dict_saver.py:144). They repeat the index and would
    double the time and the memory of reading it.

    Args:
        file: The pickle; seekable.

    Raises:
        Exception: A damaged pickle may raise any exception.
    """
    with contextlib.suppress(Exception):  # the name may occur elsewhere in the pickle
        # The unpickler reads more than an opcode at a time where it can peek.
        data = io.BytesIO(_without_plans(file.read()))
        return load(cast(BinaryIO, io.BufferedReader(cast(Any, data), 1 << 20)))
    file.seek(0)
    return load(file)


def _without_plans(data: bytes) -> bytes:
    """Cut an object's pickle before its attribute ``all_local_plans`` and close it there.

    The pickle is returned unchanged if it has no such attribute or no proper end: the cut must not
    hide that the file is truncated.
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
    """Return the offsets of a pickle's frames (protocol 4 and later) and the end of the last."""
    begins, end = [], 2
    while data.startswith(_FRAME_OPCODE, end):
        begins.append(end)
        end += _FRAME.size + int(_FRAME.unpack_from(data, end)[1])
    return begins, end


@contextlib.contextmanager
def gc_disabled() -> Iterator[None]:
    """Switch the garbage collector off: scanning an index's millions of live objects is slow."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


class Unpickler(pickle.Unpickler):
    """`pickle.Unpickler` that builds only `_HARMLESS`, torch's dtypes and `Placeholder`.

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
        """Return the harmless object of this name, or a subclass of `Placeholder`."""
        path = f"{module}.{name}"
        # The method is looked up each time: an unpickler that refers to itself would keep its
        # file and an index's objects alive until the next garbage collection.
        if path in _REBUILD:
            return getattr(self, _REBUILD[path])
        known = _HARMLESS.get(path)
        if known is not None:
            return known
        if module == "torch" and isinstance(constant := getattr(torch, name, None), torch.dtype):
            return constant
        return type(name.rpartition(".")[2], (Placeholder,), {"placeholder_class": path})

    def persistent_load(self, pid: Any) -> StoragePlace:
        """Read a storage's id, ``("storage", type, key, location, elements)``."""
        kind, storage_type, key = pid[:3]
        if kind != "storage":
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        dtype = _STORAGES.get(storage_type.placeholder_class.rpartition(".")[2], torch.uint8)
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
    """Decode bytes of a protocol 2 pickle (text in latin1); other codecs might decompress."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
    return text.encode("latin1")


def _numpy_scalar(dtype: Any, data: bytes) -> Any:
    """Convert a numpy scalar to a plain number; `dtype` is a `Placeholder`."""
    code, order = dtype.placeholder_arguments[0], dtype.placeholder_state[1]
    if code.rstrip("0123456789") not in ("i", "u", "f", "b", "c"):
        raise pickle.UnpicklingError(f"a numpy scalar of dtype {code}")
    return np.frombuffer(data, dtype=order.replace("|", "") + code)[0].item()


#: torch function that rebuilds a tensor -> the method of `Unpickler` that replaces it.
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
    IndexPlaceholder.placeholder_class: IndexPlaceholder,
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    **{f"builtins.{t.__name__}": t for t in (set, frozenset, bytearray, complex, slice, range)},
    **{f"__builtin__.{t.__name__}": t for t in (set, frozenset, bytearray, complex, slice)},
    "__builtin__.xrange": range,
}
