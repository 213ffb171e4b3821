"""What a pickle may call: harmless constructors, with the arguments that pickles really have."""

from __future__ import annotations

import argparse
import collections
import pickle
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch

from .placeholders import IndexPlaceholder, Sealed

_PLAIN_KEYS = (str, int, float, bool, bytes, type(None), torch.dtype)
#: How many values a key may have.
_OF_KEY = 100


class Namespace(argparse.Namespace, metaclass=Sealed):
    """A namespace whose class no pickle can change."""


def require_keys(found: Iterable[Any]) -> None:
    """Require keys whose hash is computed at once: plain values, and tuples of few.

    Raises:
        UnpicklingError: One is not.
    """
    for key in found:
        if type(key) in _PLAIN_KEYS:
            continue
        waiting, count = [key], 0
        while waiting:
            one = waiting.pop()
            count += 1
            if isinstance(one, tuple):
                waiting += one[:_OF_KEY]
            if count > _OF_KEY:
                raise pickle.UnpicklingError(f"a key of more than {_OF_KEY} values")


def _ordered(pairs: Any = ()) -> collections.OrderedDict[Any, Any]:
    require_keys(pair[0] for pair in pairs)
    return collections.OrderedDict(pairs)


def _items(kind: Callable[[Any], Any], *accepted: type) -> Callable[..., Any]:
    """Make a constructor that takes items as pickles have them, and no range of a billion."""

    def construct(items: Any = ()) -> Any:
        if type(items) not in accepted:
            raise pickle.UnpicklingError(f"a {kind.__name__} of a {type(items).__name__}")
        require_keys(items)
        return kind(items)

    return construct


def size(items: Any) -> torch.Size:
    """Make a torch.Size of a tuple of numbers."""
    if type(items) is not tuple:
        raise pickle.UnpicklingError(f"a torch.Size of a {type(items).__name__}")
    return torch.Size(items)


def _bytearray(data: Any = b"", encoding: str = "latin1") -> bytearray:
    if isinstance(data, str) and encoding in ("latin1", "latin-1"):
        data = data.encode("latin1")
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError(f"a bytearray of a {type(data).__name__}")
    return bytearray(data)


def _of_numbers(kind: Callable[..., Any]) -> Callable[..., Any]:
    def construct(*arguments: Any) -> Any:
        if not all(a is None or isinstance(a, int | float) for a in arguments):
            raise pickle.UnpicklingError(f"a {kind.__name__} of other things than numbers")
        return kind(*arguments)

    return construct


def _path(kind: Callable[..., Any]) -> Callable[..., Any]:
    def construct(*parts: Any) -> Any:
        if not all(isinstance(part, str) for part in parts):
            raise pickle.UnpicklingError("a path of other things than text")
        return kind(*parts)

    return construct


def _device(kind: Any, *number: Any) -> torch.device:
    if not isinstance(kind, str) or not all(type(n) is int for n in number):
        raise pickle.UnpicklingError("a torch.device of other things than its name")
    return torch.device(kind, *number)


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Decode bytes of a protocol 2 pickle (text in latin1); other codecs might decompress."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in the encoding {encoding}")
    return bytes(text.encode("latin1"))


def _numpy_scalar(dtype: Any, data: bytes) -> Any:
    """Convert a numpy scalar to a plain number; `dtype` is a `Placeholder`."""
    code, order = dtype.placeholder_arguments[0], dtype.placeholder_state[1]
    if code.rstrip("0123456789") not in ("i", "u", "f", "b", "c"):
        raise pickle.UnpicklingError(f"a numpy scalar of dtype {code}")
    return np.frombuffer(data, dtype=order.replace("|", "") + code)[0].item()


_BUILTINS: dict[str, Callable[..., Any]] = {
    "set": _items(set, list, tuple),
    "frozenset": _items(frozenset, list, tuple),
    "bytearray": _bytearray,
    **{kind.__name__: _of_numbers(kind) for kind in (complex, slice, range)},
}
HARMLESS: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": Namespace,
    "types.SimpleNamespace": Namespace,
    "collections.OrderedDict": _ordered,
    "pathlib.PosixPath": _path(PurePosixPath),
    "pathlib.PurePosixPath": _path(PurePosixPath),
    "pathlib._local.PosixPath": _path(PurePosixPath),
    "pathlib.WindowsPath": _path(PureWindowsPath),
    "torch.Size": size,
    "torch.device": _device,
    IndexPlaceholder.placeholder_class: IndexPlaceholder,
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    **{f"{module}.{n}": c for module in ("builtins", "__builtin__") for n, c in _BUILTINS.items()},
    "__builtin__.xrange": _BUILTINS["range"],
}
