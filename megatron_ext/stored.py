"""What a checkpoint directory holds: arguments, groups, step, scheduler, names and shapes.

Read without a process group, a model or Megatron, without a tensor, and without running the pickles
of the checkpoint (`megatron_ext.inert`). The format is Megatron's: training/checkpointing.py and
core/dist_checkpointing/serialization.py, 0.19.2.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from . import inert
from .checkpoint import SavedOptimizer, read_optimizer
from .errors import CheckpointError

#: training/checkpointing.py:340; holds the iteration's number or ``release``.
TRACKER = "latest_checkpointed_iteration.txt"
#: core/dist_checkpointing/core.py:14; names the backend of a distributed checkpoint.
CONFIG = "metadata.json"
#: torch's index of a distributed checkpoint (torch/distributed/checkpoint/filesystem.py).
INDEX = ".metadata"
#: core/dist_checkpointing/strategies/common.py; since 0.19 in the store instead.
COMMON = "common.pt"
COMMON_KEY = "common_state/shard_0_1"
LEGACY_FILE = "model_optim_rng.pt"
#: What a distributed optimizer writes beside it (training/checkpointing.py:326).
LEGACY_OPTIMIZER = "distrib_optim.pt"

#: An object of a distributed optimizer, which saves groups for each model-parallel group by itself
#: unless it is fully reshardable (core/optimizer/distrib_optimizer.py:1535), in a chain with its
#: number (core/optimizer/optimizer.py:1569).
_GROUPS_KEY = re.compile(
    r"(?:chained_(?P<number>\d+)\.)?optimizer\.distributed\.dp_group_idx_(?P<group>\d+)\."
    r"(?P<name>optimizer(?:_state_dict)?|grad_scaler)/shard_0_1"
)

_GRAD_SCALER = "grad_scaler"

#: Sections of the common state that have a field of their own or are large.
_SECTIONS = ("args", "optimizer", "opt_param_scheduler", "lr_scheduler", "rng_state")


class GroupsKey(NamedTuple):
    """Where one model-parallel group of a distributed optimizer saved param_groups.

    ``number`` is the optimizer's in its chain, ``group`` the model-parallel group's, ``name`` the
    key of the state dict, and ``key`` the whole key in the store.
    """

    number: int
    group: int
    name: str
    key: str

    @classmethod
    def parse(cls, key: str) -> GroupsKey | None:
        """None for the key of something else."""
        if not (found := _GROUPS_KEY.fullmatch(key)):
            return None
        return cls(int(found["number"] or 0), int(found["group"]), found["name"], key)


@dataclass(frozen=True)
class StoredCheckpoint:
    """One iteration of a checkpoint directory.

    Args:
        root: The directory given to ``--load``.
        directory: The iteration's own; `root` itself where that is a bare checkpoint.
        iteration: Its number, 0 for a release.
        release: Whether it is a release checkpoint.
        format: ``torch_dist``, or legacy ``torch``.
        args: The saved arguments by name; an enum or another object that is not plain data is an
            `inert.Inert`. Empty if none were saved.
        sharding_type: How a distributed optimizer's state is cut, ``dp_reshardable`` for example;
            None for legacy ``torch``, without optimizer state and for other optimizers.
        optimizers: One for each Megatron optimizer of the chain; empty without optimizer state.
        scheduler: The state of OptimizerParamScheduler, or None.
        grad_scalers: For each of `optimizers` the state of its grad scaler, or None.
        other: What else is saved once for all ranks: iteration, checkpoint_version,
            content_metadata and so on; no weights.
    """

    root: Path
    directory: Path
    iteration: int
    release: bool
    format: Literal["torch_dist", "torch"]
    args: Mapping[str, Any]
    sharding_type: str | None
    optimizers: tuple[SavedOptimizer, ...]
    scheduler: Mapping[str, Any] | None
    grad_scalers: tuple[Mapping[str, Any] | None, ...] = ()
    other: Mapping[str, Any] = field(default_factory=dict)
    _store: Store | None = field(default=None, repr=False, compare=False)

    @property
    def store(self) -> Store | None:
        """Index and files of a torch_dist checkpoint; legacy has none."""
        return self._store

    @functools.cached_property
    def tensors(self) -> Mapping[str, tuple[int, ...] | None]:
        """Checkpoint key -> global shape in elements, None for an object; legacy has none."""
        return {} if self._store is None else self._store.shapes()

    def require_files(self) -> None:
        """Check that the files which nothing is read of are there and whole, by size and end.

        Raises:
            CheckpointError: One is missing, truncated or of another kind; named.
        """
        if self._store is not None:
            self._store.require_files()
            return
        ranks = sorted(self.directory.glob("mp_rank_*"))
        names = [LEGACY_FILE]
        distributed = self.args.get("use_distributed_optimizer")
        if distributed is None:
            distributed = any((rank / LEGACY_OPTIMIZER).exists() for rank in ranks)
        if distributed and self.optimizers:
            names.append(LEGACY_OPTIMIZER)
        for rank in ranks:
            for name in names:
                read_file(rank / name, inert.require_torch_file)


def holds_checkpoint(root: str | Path) -> bool:
    """Whether Megatron would find a checkpoint there (training/checkpointing.py:346, 0.19.2)."""
    return (Path(root) / TRACKER).is_file()


def open_checkpoint(root: str | Path, iteration: int | None = None) -> StoredCheckpoint:
    """Read what a checkpoint holds, tensors aside.

    Args:
        root: What is given to ``--load``, or one iteration's own directory.
        iteration: Which one; the tracker file's by default.

    Raises:
        CheckpointError: There is none, it is of another kind, or damaged; says which.
    """
    root = Path(root)
    directory, number, release = _locate(root, iteration)
    names = sorted(p.name for p in directory.iterdir())
    store = None
    if CONFIG in names:
        _require_torch_dist(directory)
        store = Store(directory)
        common = _mapping(store.common(), directory)
        states, sharding_type = _distributed_optimizers(common, store)
    elif legacy := [n for n in names if n.startswith("mp_rank_")]:
        files = [f for n in legacy if (f := directory / n / LEGACY_FILE).is_file()]
        if not files:
            raise _error(
                directory, f"{legacy[0]} without {LEGACY_FILE}", "the file of the first rank"
            )
        common = _mapping(read_file(files[0], inert.load_torch), files[0])
        states, sharding_type = _legacy_optimizers(common.get("optimizer")), None
    else:
        raise _foreign(directory, names)
    try:
        optimizers = tuple(read_optimizer(s) for s in states)
    except (CheckpointError, TypeError, ValueError) as e:
        raise CheckpointError(f"{directory}: {e}") from e
    args = common.get("args")
    if number is None:
        number = common.get("iteration", 0)
        if not isinstance(number, int):
            raise _error(directory, f"the iteration {number!r}", "a number")
    return StoredCheckpoint(
        root=root,
        directory=directory,
        iteration=number,
        release=release,
        format="torch" if store is None else "torch_dist",
        args=dict(vars(args)) if isinstance(args, argparse.Namespace) else {},
        sharding_type=sharding_type if optimizers else None,
        optimizers=optimizers,
        scheduler=common.get("opt_param_scheduler", common.get("lr_scheduler")),
        grad_scalers=tuple(_as_mapping(s.get("grad_scaler")) or None for s in states),
        other={k: v for k, v in common.items() if k not in _SECTIONS and not k.startswith("model")},
        _store=store,
    )


def _locate(root: Path, iteration: int | None) -> tuple[Path, int | None, bool]:
    """Directory, number (None: inside) and whether it is a release."""
    if not root.is_dir():
        raise CheckpointError(f"{root}: expected a checkpoint directory, found none. Check --load")
    release = False
    if iteration is None:
        if not holds_checkpoint(root):
            if (root / CONFIG).is_file() or any(root.glob(f"mp_rank_*/{LEGACY_FILE}")):
                return root, None, False
            raise _foreign(root, sorted(p.name for p in root.iterdir()))
        iteration, release = _read_tracker(root / TRACKER)
    directory = root / ("release" if release else f"iter_{iteration:07d}")
    if not directory.is_dir():
        found = [p.name for p in sorted(root.glob("iter_*")) if p.is_dir()]
        raise CheckpointError(
            f"{directory} does not exist; found {', '.join(found[-5:]) or 'no iteration'} in "
            f"{root}. Restore it, choose another with --ckpt-step, or correct {TRACKER}"
        )
    return directory, iteration, release


def _read_tracker(path: Path) -> tuple[int, bool]:
    """As read_metadata (training/checkpointing.py:353, 0.19.2)."""
    text = path.read_bytes().decode(errors="replace").strip()
    if text == "release":
        return 0, True
    if not (text.isascii() and text.isdigit()):
        raise CheckpointError(
            f"{path}: expected an iteration's number or 'release', found {text[:40]!r}. Write the "
            "number of the iteration to load into it"
        )
    return int(text), False


def _require_torch_dist(directory: Path) -> None:
    def backend(file: BinaryIO) -> Any:
        return json.load(file)["sharded_backend"]

    found = read_file(directory / CONFIG, backend)
    if found != "torch_dist":
        raise _error(
            directory,
            f"a distributed checkpoint of the backend {found!r}",
            "torch_dist or torch",
            "Convert it with a Megatron that reads it",
        )


def _distributed_optimizers(
    common: Mapping[str, Any], store: Store
) -> tuple[list[Mapping[str, Any]], str | None]:
    """The optimizers of a torch_dist checkpoint in the chain's order, and how they are cut."""
    kept = store.groups()
    section = common.get("optimizer")
    inline: dict[int, Any] = {}
    if isinstance(section, Mapping) and section:
        chained = all(isinstance(key, int) for key in section)
        inline = dict(section) if chained else {0: section}
    states: dict[int, Mapping[str, Any]] = {
        number: {**_as_mapping(inline.get(number)), **kept.get(number, {})}
        for number in sorted({*inline, *kept})
    }
    sharding = [s["param_state_sharding_type"] for s in states.values() if _sharded(s)]
    optimizers = [s for s in states.values() if has_groups(s)]
    return optimizers, _sharding_type(common, sharding[0] if sharding else None)


def _sharding_type(common: Mapping[str, Any], recorded: str | None) -> str | None:
    """As load_checkpoint chooses it (training/checkpointing.py:2198-2229, 0.19.2)."""
    metadata = common.get("content_metadata")
    named = _as_mapping(metadata).get("distrib_optim_sharding_type")
    if named is not None or recorded is not None:
        return str(named if named is not None else recorded)
    args = common.get("args")
    if metadata is not None or not getattr(args, "use_distributed_optimizer", False):
        return None
    fully_parallel = getattr(args, "ckpt_fully_parallel_save", False)
    return "fully_sharded_model_space" if fully_parallel else "dp_zero_gather_scatter"


def _legacy_optimizers(section: Any) -> list[Mapping[str, Any]]:
    """A chain of several is a list (ChainedOptimizer.state_dict, core/optimizer/optimizer.py)."""
    states = section if isinstance(section, list) else [section]
    return [s for s in states if isinstance(s, Mapping) and has_groups(s)]


def has_groups(state: Mapping[str, Any]) -> bool:
    """Whether there are param_groups in the state dict of one Megatron optimizer."""
    nested = (state.get("optimizer"), state.get("optimizer_state_dict"))
    return any("param_groups" in _as_mapping(s) for s in (state, *nested))


def _sharded(state: Mapping[str, Any]) -> bool:
    return state.get("param_state_sharding_type") is not None


def _as_mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


class Store:
    """The files of a torch_dist checkpoint: the index, and objects inside the ``.distcp`` files.

    Its methods raise `CheckpointError` where a file is missing or damaged.

    Args:
        directory: The iteration's own.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def directory(self) -> Path:
        """The iteration's own."""
        return self._directory

    @functools.cached_property
    def index(self) -> Any:
        """The Metadata of torch, as an `inert.Inert`."""
        path = self._directory / INDEX
        if not path.is_file():
            raise _error(self._directory, f"{CONFIG} without {INDEX}", "both")
        index = read_file(path, inert.load_index)
        wanted = ("state_dict_metadata", "storage_data")
        if not all(isinstance(getattr(index, name, None), dict) for name in wanted):
            raise _error(path, f"{type(index).__name__}", "torch's Metadata")
        return index

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Key -> global shape in elements, None for an object."""
        entries = self.index.state_dict_metadata
        return {k: tuple(e.size) if hasattr(e, "size") else None for k, e in entries.items()}

    def common(self) -> Any:
        """What is the same on all ranks (load_common_state_dict, serialization.py)."""
        path = self._directory / COMMON
        if path.is_file():
            return read_file(path, inert.load_torch)
        if COMMON_KEY not in self.index.state_dict_metadata:
            raise _error(
                self._directory,
                f"neither {COMMON} nor common_state in the store",
                "one of them",
            )
        return self.object(COMMON_KEY)

    def group_keys(self) -> list[GroupsKey]:
        """The objects that hold groups of a distributed optimizer, first groups first."""
        return [key for key in self._optimizer_keys() if key.name != _GRAD_SCALER]

    def groups(self) -> dict[int, dict[str, Any]]:
        """Number in the chain -> groups and grad scaler of its first model-parallel group."""
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

    def object(self, key: str, reader: Callable[[BinaryIO], Any] = inert.load_torch) -> Any:
        """One ShardedObject of those above: ``torch.save([object])`` at a place in a file."""
        info = self._objects.get(key)
        if info is None:
            raise _error(self._directory / INDEX, f"no place for {key}", "one")
        (found,) = self._slice(info, key, lambda data: reader(io.BytesIO(data)))
        return found

    def require_files(self) -> None:
        """That every file is there and long enough, from the index and the directory."""
        ends: dict[str, int] = {}
        for info in self.index.storage_data.values():
            end = info.offset + info.length
            if end > ends.get(info.relative_path, 0):
                ends[info.relative_path] = end
        for name, end in sorted(ends.items()):
            path = self._directory / name
            found = path.stat().st_size if path.is_file() else None
            if found is None or found < end:
                size = "no file" if found is None else f"{found} bytes"
                raise _error(path, size, f"at least {end} bytes, as {INDEX} says")

    @contextlib.contextmanager
    def open(self, info: Any, key: str) -> Iterator[BinaryIO]:
        """One item of the store as a file of its own; nothing is read ahead.

        Args:
            info: From the index's ``storage_data``.
            key: The item's, for messages.
        """
        path = self._path(info, key)
        try:
            with path.open("rb", buffering=0) as file:
                yield inert.window(file, info.offset, info.length)
        except CheckpointError:
            raise
        except Exception as e:
            raise _unreadable(path, e) from e

    def read(self, info: Any, key: str) -> bytes:
        """The bytes of one item of the store; `info` is from the index's ``storage_data``."""
        data: bytes = self._slice(info, key, bytes)
        return data

    def _path(self, info: Any, key: str) -> Path:
        if getattr(info, "transform_descriptors", None):
            raise _error(
                self._directory, f"{key} as {info.transform_descriptors}", "an item as it is"
            )
        path = self._directory / info.relative_path
        if path.parent != self._directory:
            raise _error(self._directory / INDEX, f"the file {info.relative_path}", "one beside it")
        return path

    def _slice(self, info: Any, key: str, reader: Callable[[bytes], Any]) -> Any:
        path = self._path(info, key)

        def read(file: BinaryIO) -> Any:
            file.seek(info.offset)
            data = file.read(info.length)
            if len(data) != info.length:
                raise EOFError(f"{len(data)} of {info.length} bytes of {key}")
            return reader(data)

        return read_file(path, read)


def read_file(path: Path, reader: Callable[[BinaryIO], Any]) -> Any:
    """What `reader` makes of a file of a checkpoint.

    Args:
        path: The file.
        reader: Is given the open file.

    Raises:
        CheckpointError: The file is missing or damaged, or the reader's own.
    """
    try:
        with path.open("rb") as file:
            return reader(file)
    except CheckpointError:
        raise
    except Exception as e:  # a damaged pickle fails in any way
        raise _unreadable(path, e) from e


def _unreadable(path: Path, e: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot read {path}: {type(e).__name__}: {e}. The file is missing, truncated or "
        "damaged: restore it, or load another iteration with --ckpt-step"
    )


def _mapping(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _error(path, f"a {type(value).__name__}", "a dict of Megatron's training state")
    return value


def _foreign(directory: Path, names: list[str]) -> CheckpointError:
    if INDEX in names:
        return _error(
            directory,
            f"{INDEX} without {CONFIG} (torch_dcp or fsdp_dtensor)",
            "a checkpoint of the format torch_dist or torch",
            "Save it with --ckpt-format torch_dist",
        )
    return _error(
        directory,
        ", ".join(names[:6]) or "nothing",
        f"a Megatron checkpoint: {TRACKER}, {CONFIG} or mp_rank_* directories",
        "Check --load",
    )


def _error(where: Path, found: str, expected: str, remedy: str = "") -> CheckpointError:
    remedy = remedy or "Restore the checkpoint or load another iteration with --ckpt-step"
    return CheckpointError(f"{where}: expected {expected}, found {found}. {remedy}")
