"""The store of a torch_dist checkpoint: its index, its common state and its objects."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..base.files import open_regular
from ..errors import CheckpointError
from . import index_fit, pickles, torch_file
from .index_check import bad_entry
from .index_fit import INDEX as INDEX
from .names import leading_axes

#: training/checkpointing.py:340; holds the iteration's number or ``release``.
TRACKER = "latest_checkpointed_iteration.txt"
#: core/dist_checkpointing/core.py:14; names the backend of a distributed checkpoint.
CONFIG = "metadata.json"
#: core/dist_checkpointing/strategies/common.py; since 0.19 in the store instead.
COMMON = "common.pt"
COMMON_KEY = "common_state/shard_0_1"
LEGACY_FILE = "model_optim_rng.pt"
#: What a distributed optimizer writes beside it (training/checkpointing.py:326).
LEGACY_OPTIMIZER = "distrib_optim.pt"
#: An object of a distributed optimizer. Unless its state is fully reshardable, each model-parallel
#: group saves its own param_groups (core/optimizer/distrib_optimizer.py:1535). In a chain the key
#: begins with the optimizer's number (core/optimizer/optimizer.py:1569).
_GROUPS_KEY = re.compile(
    r"(?:chained_(?P<number>\d+)\.)?optimizer\.distributed\.dp_group_idx_(?P<group>\d+)\."
    r"(?P<name>optimizer(?:_state_dict)?|grad_scaler)/shard_0_1"
)
_GRAD_SCALER = "grad_scaler"
#: More layers, and more experts of all layers, than any model has.
_LAYERS = 1 << 20


class GroupsKey(NamedTuple):
    """The key under which a model-parallel group of a distributed optimizer saved param_groups.

    Args:
        number: Number of the optimizer in its chain.
        group: Number of the model-parallel group.
        name: Key of the state dict.
        key: The whole key in the store.
    """

    number: int
    group: int
    name: str
    key: str

    @classmethod
    def parse(cls, key: str) -> GroupsKey | None:
        """Parse a key; None if it is of another object."""
        if not (found := _GROUPS_KEY.fullmatch(key)):
            return None
        return cls(int(found["number"] or 0), int(found["group"]), found["name"], key)


class Store:
    """The files of a torch_dist checkpoint: the index, and objects inside the ``.distcp`` files.

    Its methods raise `CheckpointError` if a file is missing or damaged.

    Args:
        directory: The directory of the iteration.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def directory(self) -> Path:
        """The directory of the iteration."""
        return self._directory

    @functools.cached_property
    def index(self) -> Any:
        """Metadata of torch, as a `Placeholder`."""
        path = self._directory / INDEX
        if not path.is_file():
            raise unexpected(self._directory, f"{CONFIG} without {INDEX}", "both")
        index = read_file(path, pickles.load_index)
        wanted = ("state_dict_metadata", "storage_data")
        if not all(isinstance(getattr(index, name, None), dict) for name in wanted):
            raise unexpected(path, f"{type(index).__name__}", "torch's Metadata")
        with pickles.gc_disabled():
            why = bad_entry(index)
        if why:
            raise unexpected(path, why, f"tensors as torch describes them in {INDEX}")
        return index

    def require_whole_index(self) -> None:
        """Read the part of the index too that only torch reads: the plans of all ranks."""
        read_file(self._directory / INDEX, functools.partial(pickles.load_index, whole=True))

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Return key -> global shape in elements, None for an object."""
        entries = self.index.state_dict_metadata
        shapes = {k: tuple(e.size) if hasattr(e, "size") else None for k, e in entries.items()}
        for key, shape in shapes.items():
            # Each layer and each expert becomes a name of its own.
            if shape is None or max(shape[:2], default=0) <= _LAYERS:
                continue
            if math.prod(shape[: leading_axes(key)]) > _LAYERS:
                expected = f"at most {_LAYERS} layers and experts"
                raise unexpected(self._directory / INDEX, f"{key} of shape {shape}", expected)
        return shapes

    @property
    def common_in_store(self) -> bool:
        """Whether the state common to all ranks is an object in the store, and in no file."""
        return not (self._directory / COMMON).is_file()

    def common(self) -> Any:
        """Read the state common to all ranks (load_common_state_dict, serialization.py)."""
        path = self._directory / COMMON
        if path.is_file():
            return read_file(path, torch_file.load_torch)
        if COMMON_KEY not in self.index.state_dict_metadata:
            raise unexpected(
                self._directory,
                f"neither {COMMON} nor common_state in the store",
                "one of them",
            )
        return self.object(COMMON_KEY)

    def group_keys(self) -> list[GroupsKey]:
        """List the objects that hold param_groups of a distributed optimizer, sorted."""
        return [key for key in self._optimizer_keys() if key.name != _GRAD_SCALER]

    def groups(self) -> dict[int, dict[str, Any]]:
        """Return chain number -> groups and grad scaler of the first model-parallel group."""
        first: dict[tuple[int, bool], GroupsKey] = {}
        for key in self._optimizer_keys():
            first.setdefault((key.number, key.name == _GRAD_SCALER), key)
        groups: dict[int, dict[str, Any]] = defaultdict(dict)
        for key in first.values():
            groups[key.number][key.name] = self.object(key.key)
        return dict(groups)

    def _optimizer_keys(self) -> list[GroupsKey]:
        found = filter(None, map(GroupsKey.parse, self.index.state_dict_metadata))
        return sorted(found, key=lambda k: (k.number, k.group, k.name))

    @functools.cached_property
    def _objects(self) -> dict[str, Any]:
        names = ("optimizer", "optimizer_state_dict", "grad_scaler")
        wanted = (COMMON_KEY, *(f"{name}/shard_0_1" for name in names))
        storage = self.index.storage_data
        return {i.fqn: info for i, info in storage.items() if i.fqn.endswith(wanted)}

    def object(self, key: str, reader: Callable[[BinaryIO], Any] = torch_file.load_torch) -> Any:
        """Read one of the ShardedObjects above, stored as ``torch.save([object])``."""
        info = self._objects.get(key)
        if info is None:
            raise unexpected(self._directory / INDEX, f"no place for {key}", "one")
        found = self._slice(info, key, lambda data: reader(io.BytesIO(data)))
        if not isinstance(found, list) or len(found) != 1:
            raise unexpected(
                self._directory, f"a {type(found).__name__} for {key}", "a list with the object"
            )
        return found[0]

    def require_files(self) -> None:
        """Check the files against the index, and that its pieces fill every tensor."""
        with pickles.gc_disabled():
            problem = next(index_fit.problems(self._directory, self.index), None)
        if problem is not None:
            raise unexpected(self._directory / problem.file, problem.found, problem.expected)

    @contextlib.contextmanager
    def open(self, info: Any, key: str) -> Iterator[BinaryIO]:
        """Open one item of the store as a file of its own, without reading ahead.

        Args:
            info: An entry of the index's ``storage_data``.
            key: Key of the item, for messages.
        """
        path = self._path(info, key)
        try:
            with open_regular(path, buffering=0) as file:
                yield torch_file.window(file, info.offset, info.length)
        except CheckpointError:
            raise
        except Exception as e:
            raise unreadable(path, e) from e

    def read(self, info: Any, key: str) -> bytes:
        """Read one item of the store; `info` is an entry of the index's ``storage_data``."""
        data: bytes = self._slice(info, key, bytes)
        return data

    def _path(self, info: Any, key: str) -> Path:
        if getattr(info, "transform_descriptors", None):
            raise unexpected(
                self._directory, f"{key} as {info.transform_descriptors}", "an item as it is"
            )
        path = self._directory / info.relative_path
        if path.parent != self._directory:
            raise unexpected(
                self._directory / INDEX, f"the file {info.relative_path}", "one beside it"
            )
        return path

    def _slice(self, info: Any, key: str, reader: Callable[[bytes], Any]) -> Any:
        path = self._path(info, key)

        def read(file: BinaryIO) -> Any:
            # Before they are read: memory is taken for as many bytes as are asked for.
            there = max(0, file.seek(0, io.SEEK_END) - info.offset)
            if there < info.length:
                raise EOFError(f"{there} of {info.length} bytes of {key}")
            file.seek(info.offset)
            return reader(file.read(info.length))

        return read_file(path, read)


def read_file(path: Path, reader: Callable[[BinaryIO], Any]) -> Any:
    """Open a file of a checkpoint and return the result of `reader`.

    Args:
        path: The file.
        reader: Called with the open file.

    Raises:
        CheckpointError: The file is missing or damaged, or `reader` raised one.
    """
    try:
        with open_regular(path) as file:
            return reader(file)
    except CheckpointError:
        raise
    except Exception as e:  # a damaged pickle fails in any way
        raise unreadable(path, e) from e


def unreadable(path: Path, e: BaseException) -> CheckpointError:
    """Make the error for a file of a checkpoint that raises another one when it is read."""
    if isinstance(e, FileNotFoundError):
        remedy = "The file is missing: restore it, or load another iteration with --ckpt-step"
    elif isinstance(e, PermissionError):
        remedy = "Let the user that runs this read it, or load another iteration with --ckpt-step"
    elif isinstance(e, OSError):
        remedy = (
            "Check the file system, restore the file, or load another iteration with --ckpt-step"
        )
    else:
        remedy = (
            "The file is truncated or damaged: restore it, or load another iteration with "
            "--ckpt-step"
        )
    return CheckpointError(f"cannot read {path}: {type(e).__name__}: {e}. {remedy}")


def unexpected(where: Path, found: str, expected: str, remedy: str = "") -> CheckpointError:
    """Make the error for a file of a checkpoint with unexpected content."""
    remedy = remedy or "Restore the checkpoint or load another iteration with --ckpt-step"
    return CheckpointError(f"{where}: expected {expected}, found {found}. {remedy}")
