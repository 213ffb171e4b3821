"""Set keys of a stored common state without running its pickle.

The state holds the run's arguments, whose classes need not be importable here. So the pickle is
kept as it is, and the new values are appended: keys, values, SETITEMS.
"""

from __future__ import annotations

import io
import itertools
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..checkpoint.placeholders import TensorPlaceholder
from ..errors import CheckpointError

#: Class of a stored tensor's storage (torch/serialization.py, persistent_id).
_STORAGES = {torch.float32: torch.FloatStorage, torch.int64: torch.LongStorage}
_PLAIN = (str, int, float, bool, type(None))


def plain(value: Any, where: str) -> Any:
    """Copy a value that the inert reader returned so that it can be pickled again.

    Args:
        value: Plain data, and tensors of one element.
        where: The value's place in the checkpoint, for messages.

    Raises:
        CheckpointError: It holds an object of another class.
    """
    if isinstance(value, Mapping):
        return {plain(k, where): plain(v, f"{where}: {k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v, where) for v in value)
    if isinstance(value, TensorPlaceholder) and {"value", "dtype"} <= vars(value).keys():
        shape, dtype = vars(value)["shape"], vars(value)["dtype"]
        if dtype in _STORAGES:
            return torch.full(shape, vars(value)["value"], dtype=dtype)
    if type(value) in _PLAIN:
        return value
    found = getattr(value, "placeholder_class", type(value).__name__)
    raise CheckpointError(
        f"{where}: expected numbers, text and tensors of one element, found {found}. Save once "
        "more with the old configuration and --dist-ckpt-optim-fully-reshardable"
    )


def with_values(data: bytes, values: Mapping[str, Any], where: str) -> bytes:
    """Return a file of ``torch.save`` whose dict has other values for some keys.

    Args:
        data: The file; it holds the dict, or a list with this dict only.
        values: Key -> new value, of `plain`.
        where: The file, for messages.

    Raises:
        CheckpointError: The file holds something else.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            root, _, name = entry.filename.rpartition("/")
            if name == "data.pkl":
                content, records = _append(content, values, where)
                for key, record in records.items():
                    new.writestr(f"{root}/data/{key}", record, zipfile.ZIP_STORED)
            new.writestr(entry.filename, content, zipfile.ZIP_STORED)
    return out.getvalue()


def _append(data: bytes, values: Mapping[str, Any], where: str) -> tuple[bytes, dict[str, bytes]]:
    names = [op.name for op, _, _ in pickletools.genops(data)]
    # An object of the store is in a list (strategies/torch.py:217, 0.19.2).
    closing = 2 if names[-2] == "APPEND" else 1
    if "FRAME" in names or names[-1 - closing] not in ("SETITEM", "SETITEMS"):
        raise CheckpointError(
            f"{where}: expected a dict in a pickle of protocol 2 or 3, found one that ends with "
            f"{', '.join(names[-3:])}. Save once more with the old configuration and "
            "--dist-ckpt-optim-fully-reshardable"
        )
    file = io.BytesIO()
    pickler = _Pickler(file, 2)
    added = b""
    for part in itertools.chain.from_iterable(values.items()):
        file.seek(0)
        file.truncate()
        pickler.clear_memo()
        pickler.dump(part)
        # Without PROTO and STOP. The memo may be overwritten: nothing refers to it any more.
        added += file.getvalue()[2:-1]
    # MARK, the keys and values, SETITEMS.
    return data[:-closing] + b"(" + added + b"u" + data[-closing:], pickler.records


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    elements: int


class _Pickler(pickle.Pickler):
    """Pickles tensors as ``torch.save`` does; `records` are the storages' elements."""

    def __init__(self, file: io.BytesIO, protocol: int) -> None:
        super().__init__(file, protocol)
        self.records: dict[str, bytes] = {}

    def reducer_override(self, value: Any) -> Any:
        """Take a tensor apart; leave the rest to pickle."""
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        key = f"new_{len(self.records)}"
        self.records[key] = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        storage = _Storage(value.dtype, key, value.numel())
        rest: tuple[Any, ...] = (0, tuple(value.shape), tuple(value.stride()), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, (storage, *rest)

    def persistent_id(self, value: Any) -> Any:
        """Return what torch's reader calls a storage."""
        if not isinstance(value, _Storage):
            return None
        return "storage", _STORAGES[value.dtype], value.key, "cpu", value.elements
