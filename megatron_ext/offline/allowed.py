"""Load a checkpoint's objects, to write them again, from a fixed list of classes.

`checkpoint.pickles` builds placeholders, which cannot be written again. Here the objects are built,
by torch's ``weights_only`` unpickler or by one that is as strict. Only names on the lists below are
imported: those that Megatron itself trusts (core/safe_globals.py, 0.19.2), its enums, and torch's
own classes of an index.
"""

from __future__ import annotations

import enum
import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ..errors import CheckpointError

#: Modules whose name may differ between the writing and the reading environment.
_RENAMED = {
    "pathlib._local": "pathlib",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy._core.multiarray": "numpy.core.multiarray",
}
_OBJECTS = {
    "argparse.Namespace",
    "types.SimpleNamespace",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib._local.PosixPath",
    "pathlib._local.PurePosixPath",
    "_io.BytesIO",
    "signal.Signals",
    "torch._C.Generator",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{c}.multiarray.{n}" for c in ("core", "_core") for n in ("_reconstruct", "scalar")),
    *(f"builtins.{t.__name__}" for t in (complex, frozenset, range, slice)),
}
#: Any enum of these modules may be loaded.
_ENUMS = (
    "megatron.core.enums",
    "megatron.core.transformer.enums",
    "megatron.core.rerun_state_machine",
)
#: Allowed dtypes of arrays; objects are not, because they are pickles themselves.
_NUMBERS = "?bBhHiIlLqQefdFD"

_INDEX = {
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            "Metadata",
            "MetadataIndex",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        f"torch.distributed.checkpoint.planner.{name}"
        for name in (
            "SavePlan",
            "WriteItem",
            "WriteItemType",
            "TensorWriteData",
            "BytesIOWriteData",
        )
    ),
    *(
        f"megatron.core.dist_checkpointing.strategies.torch.{name}"
        for name in ("MCoreMetadata", "MCoreSavePlan")
    ),
    "collections.OrderedDict",
    "builtins.set",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
}


def load_torch(file: BinaryIO, where: str, allow_pickle: bool = False) -> Any:
    """Load a file of ``torch.save``, with tensors on the CPU.

    Args:
        file: Seekable. A file on disk is memory-mapped.
        where: Its name for errors.
        allow_pickle: Whether any code in it may run.

    Raises:
        CheckpointError: It needs a name that is not on the list.
    """
    mapped = isinstance(getattr(file, "name", None), str | Path)
    source = file.name if mapped else file
    arguments: dict[str, Any] = {"map_location": "cpu", "mmap": True if mapped else None}
    if allow_pickle:
        return torch.load(source, weights_only=False, **arguments)
    try:
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        known = _classes(list(needed), where)
        file.seek(0)
        with torch.serialization.safe_globals(known):
            return torch.load(source, weights_only=True, **arguments)
    except pickle.UnpicklingError as e:
        # Keep only the cause: torch's advice is about its own flags.
        what = str(e).rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        raise _refused(where, f"more than weights ({what})") from None


def load_index(file: BinaryIO, where: str, allow_pickle: bool = False) -> Any:
    """Load torch's index of a distributed checkpoint; see `load_torch`."""
    if allow_pickle:
        return pickle.load(file)
    return _IndexUnpickler(file, where).load()


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, where: str) -> None:
        super().__init__(file)
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in _INDEX:
            return _imported(path, self._where)
        if module == "torch" and isinstance(constant := getattr(torch, name, None), torch.dtype):
            return constant
        raise _refused(self._where, path)


def _classes(names: list[str], where: str) -> list[Callable[..., Any] | tuple[Any, str]]:
    out: list[Callable[..., Any] | tuple[Any, str]] = []
    refused = []
    for name in names:
        module = name.rpartition(".")[0]
        if name in _OBJECTS:
            out.append((_imported(name, where), name))
        elif module in _ENUMS and _is_enum(found := _imported(name, where)):
            out.append((found, name))
        else:
            refused.append(name)
    if refused:
        raise _refused(where, ", ".join(sorted(refused)))
    # Each dtype has its own class, which the pickle does not name. Nor is numpy.dtype among the
    # names if it is allowed already: importing Megatron does that (core/safe_globals.py, 0.19.2).
    out += [type(np.dtype(code)) for code in _NUMBERS]
    return out


def _is_enum(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, enum.Enum)


def _imported(path: str, where: str) -> Any:
    module, _, name = path.rpartition(".")
    for place in (module, _RENAMED.get(module, module)):
        try:
            return getattr(importlib.import_module(place), name)
        except (ImportError, AttributeError):
            continue
    raise CheckpointError(
        f"{where}: it holds a {path}, which is not installed here. Run this with the Megatron that "
        "wrote the checkpoint"
    )


def _refused(where: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: expected plain data, found a pickle that needs {what}, which is not on the list "
        "of what may be loaded. Loading it could run any code: only if you trust whoever wrote the "
        "checkpoint, pass --allow-pickle"
    )
