"""Read pickles without running them: unknown classes become placeholders."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import pickle
import struct
import types
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, ClassVar, cast

import torch

from ..base.memory import limited
from .bounded import require_shapes
from .harmless import HARMLESS, require_keys
from .placeholders import Placeholder, StoragePlace, TensorPlaceholder

_PLANS = b"all_local_plans"
#: Opcode and length (pickletools: FRAME).
_FRAME = struct.Struct("<cQ")
_FRAME_OPCODE = b"\x95"
#: Up to this size in bytes an index is read with the same care as other objects.
_SMALL = 1 << 20
#: Bytes of the largest index; one of a trillion parameters has 0.2 GB.
_LARGEST = 1 << 31
#: What a larger one may take: Python's objects of a real one take 15 bytes for each of its own.
_MEMORY, _MEMORY_PER_BYTE = 1 << 28, 40


def load(file: BinaryIO) -> Any:
    """Unpickle without running any code of the pickle.

    Args:
        file: The pickle.

    Raises:
        Exception: A damaged pickle may raise any exception.
    """
    with gc_disabled():
        return Unpickler(file).load()


def _load_fast(data: bytes) -> Any:
    if len(data) <= _SMALL:
        return load(io.BytesIO(data))
    # The unpickler reads more than an opcode at a time where it can peek.
    file = io.BufferedReader(cast(Any, io.BytesIO(data)), 1 << 20)
    with gc_disabled(), limited(_MEMORY + _MEMORY_PER_BYTE * len(data)):
        return _FastUnpickler(cast(BinaryIO, file)).load()


def load_index(file: BinaryIO, *, whole: bool = False) -> Any:
    """Unpickle torch's index of a distributed checkpoint, without the plans of all ranks.

    megatron-core 0.19 stores the plans at the end of the index (``all_local_plans``,
    core/dist_checkpointing/strategies/state_dict_saver.py:144). They repeat the index and would
    double the time and the memory of reading it.

    Args:
        file: The pickle; seekable.
        whole: Whether to read the plans too, as torch does.

    Raises:
        Exception: A damaged pickle may raise any exception.
    """
    if (size := file.seek(0, io.SEEK_END)) > _LARGEST:
        raise pickle.UnpicklingError(f"{size} bytes; expected an index of at most {_LARGEST}")
    file.seek(0)
    data = file.read()
    short = data if whole else _without_plans(data)
    if short is not data:
        with contextlib.suppress(Exception):  # the name may occur elsewhere in the pickle
            return _load_fast(short)
    return _load_fast(data)


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


class _Inert:
    """What both unpicklers share: they build only `HARMLESS`, torch's dtypes and `Placeholder`."""

    _element: Callable[[str, int, int], bytes] | None = None

    def find_class(self, module: str, name: str) -> Any:
        """Return the harmless object of this name, or a subclass of `Placeholder`."""
        path = f"{module}.{name}"
        # The method is looked up each time: an unpickler that refers to itself would keep its
        # file and an index's objects alive until the next garbage collection.
        if path in _REBUILD:
            return getattr(self, _REBUILD[path])
        known = HARMLESS.get(path)
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
        require_shapes(size)
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


class _FastUnpickler(_Inert, pickle.Unpickler):
    """Python's own, in C: for an index of a million entries."""


_Machine: Any = cast(Any, pickle)._Unpickler


def _checked(code: bytes, keys: slice) -> Callable[[Any], None]:
    """Look at the keys on the stack before an opcode puts them into a dict or set."""
    original: Callable[[Any], None] = _Machine.dispatch[code[0]]

    def load(machine: Any) -> None:
        require_keys(machine.stack[keys])
        original(machine)

    return load


def _load_build(machine: Any) -> None:
    if isinstance(machine.stack[-2], type | types.FunctionType | types.MethodType):
        raise pickle.UnpicklingError("a state of a class or function")
    _Machine.dispatch[pickle.BUILD[0]](machine)


def _load_bytearray(machine: Any) -> None:
    (size,) = struct.unpack("<Q", machine.read(8))
    machine.append(bytearray(machine.read(size)))


class Unpickler(_Inert, _Machine):
    """The same in Python, which looks at what would take C forever, or all memory.

    C computes the hash of a key whatever it is: of a tuple that holds a tuple twice, and so on
    sixty times, never. It also makes room for as many memorised objects as a number claims.

    Args:
        file: The pickle.
        element: Reads bytes of a storage: key, offset and size in bytes.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        **_Machine.dispatch,
        pickle.SETITEM[0]: _checked(pickle.SETITEM, slice(-2, -1)),
        pickle.SETITEMS[0]: _checked(pickle.SETITEMS, slice(0, None, 2)),
        pickle.DICT[0]: _checked(pickle.DICT, slice(0, None, 2)),
        pickle.ADDITEMS[0]: _checked(pickle.ADDITEMS, slice(None)),
        pickle.FROZENSET[0]: _checked(pickle.FROZENSET, slice(None)),
        pickle.BUILD[0]: _load_build,
        pickle.BYTEARRAY8[0]: _load_bytearray,
    }

    def __init__(
        self, file: BinaryIO, element: Callable[[str, int, int], bytes] | None = None
    ) -> None:
        super().__init__(file)
        self._element = element

    def load(self) -> Any:
        """Return the object.

        Raises:
            UnpicklingError: The pickle is truncated, damaged, or has what none of Megatron's has.
        """
        try:
            return super().load()
        except pickle.UnpicklingError:
            raise
        except Exception as e:  # a damaged pickle fails in any way
            why = f"the pickle is truncated or damaged ({type(e).__name__}: {e})"
            raise pickle.UnpicklingError(why) from e


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
