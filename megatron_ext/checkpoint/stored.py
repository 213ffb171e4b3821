"""Read a checkpoint directory: arguments, groups, step, scheduler, tensor names and shapes.

Needs no process group, no model and no Megatron. It reads no tensor and runs no pickle of the
checkpoint (`.pickles`). The format is Megatron's: training/checkpointing.py and
core/dist_checkpointing/serialization.py, 0.19.2.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ..errors import CheckpointError
from . import torch_file
from .run_config import arguments
from .state import SavedOptimizer, read_optimizer
from .store import (
    CONFIG,
    INDEX,
    LEGACY_FILE,
    LEGACY_OPTIMIZER,
    TRACKER,
    Store,
    read_file,
    unexpected,
)

#: Bytes that are read of a tracker file and of metadata.json, and digits of an iteration.
_LINE, _DIGITS = 1 << 16, 18
#: Sections of the common state that have a field of their own or are large.
_SECTIONS = ("args", "optimizer", "opt_param_scheduler", "lr_scheduler", "rng_state")


@dataclass(frozen=True)
class StoredCheckpoint:
    """One iteration of a checkpoint directory.

    Args:
        root: The directory given to ``--load``.
        directory: The directory of the iteration; `root` itself if that is a bare checkpoint.
        iteration: Its number, 0 for a release.
        release: Whether it is a release checkpoint.
        format: ``torch_dist``, or legacy ``torch``.
        args: The saved arguments by name; Bridge's config by Megatron's names. An object that is
            not plain data is a `Placeholder`. Empty if none were saved.
        sharding_type: Sharding of a distributed optimizer's state, such as ``dp_reshardable``;
            None for legacy ``torch``, without optimizer state and for other optimizers.
        optimizers: One for each Megatron optimizer of the chain; empty without optimizer state.
        scheduler: The state of OptimizerParamScheduler, or None.
        grad_scalers: For each of `optimizers` the state of its grad scaler, or None.
        other: The rest of the state common to all ranks, such as iteration, checkpoint_version
            and content_metadata; no weights.
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
        """Check size and end of the files that are not read.

        Raises:
            CheckpointError: A file is missing, truncated or of another kind. The error names it.
        """
        if self._store is not None:
            self._store.require_files()
        for path in self.legacy_files():
            read_file(path, torch_file.require_torch_file)

    def legacy_files(self) -> list[Path]:
        """List the files of all ranks that a legacy checkpoint should have; else nothing."""
        ranks = [] if self._store is not None else sorted(self.directory.glob("mp_rank_*"))
        names = [LEGACY_FILE]
        distributed = self.args.get("use_distributed_optimizer")
        if distributed is None:
            distributed = any((rank / LEGACY_OPTIMIZER).exists() for rank in ranks)
        if distributed and self.optimizers:
            names.append(LEGACY_OPTIMIZER)
        return [rank / name for rank in ranks for name in names]


def holds_checkpoint(root: str | Path) -> bool:
    """Whether Megatron would find a checkpoint here (training/checkpointing.py:346, 0.19.2)."""
    return (Path(root) / TRACKER).is_file()


def open_checkpoint(root: str | Path, iteration: int | None = None) -> StoredCheckpoint:
    """Read a checkpoint without its tensors.

    Args:
        root: The directory given to ``--load``, or the directory of one iteration.
        iteration: The iteration to read; by default the one in the tracker file.

    Raises:
        CheckpointError: The checkpoint is missing, damaged, or of another kind.
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
            raise unexpected(
                directory, f"{legacy[0]} without {LEGACY_FILE}", "the file of the first rank"
            )
        common = _mapping(read_file(files[0], torch_file.load_torch), files[0])
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
        if not isinstance(number, int) or number < 0:
            raise unexpected(directory, f"the iteration {number!r}", "a number")
    return StoredCheckpoint(
        root=root,
        directory=directory,
        iteration=number,
        release=release,
        format="torch" if store is None else "torch_dist",
        args=dict(vars(args)) if isinstance(args, argparse.Namespace) else arguments(directory),
        sharding_type=sharding_type if optimizers else None,
        optimizers=optimizers,
        scheduler=_scheduler(common, directory),
        grad_scalers=tuple(_as_mapping(s.get("grad_scaler")) or None for s in states),
        other={k: v for k, v in common.items() if k not in _SECTIONS and not k.startswith("model")},
        _store=store,
    )


def _locate(root: Path, iteration: int | None) -> tuple[Path, int | None, bool]:
    """Return directory, number (None if it is stored inside) and whether it is a release."""
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
    """Read the tracker as read_metadata does (training/checkpointing.py:353, 0.19.2)."""
    text = read_file(path, lambda file: file.read(_LINE)).decode(errors="replace").strip()
    if text == "release":
        return 0, True
    if not (text.isascii() and text.isdigit() and len(text) <= _DIGITS):
        raise CheckpointError(
            f"{path}: expected an iteration's number or 'release', found {text[:40]!r}. Write the "
            "number of the iteration to load into it"
        )
    return int(text), False


def _require_torch_dist(directory: Path) -> None:
    def backend(file: BinaryIO) -> Any:
        return json.loads(file.read(_LINE))["sharded_backend"]

    found = read_file(directory / CONFIG, backend)
    if found != "torch_dist":
        raise unexpected(
            directory,
            f"a distributed checkpoint of the backend {found!r}",
            "torch_dist or torch",
            "Convert it with a Megatron that reads it",
        )


def _distributed_optimizers(
    common: Mapping[str, Any], store: Store
) -> tuple[list[Mapping[str, Any]], str | None]:
    """Return the optimizers of a torch_dist checkpoint in the chain's order, and the sharding."""
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
    """Choose the sharding as load_checkpoint does (training/checkpointing.py:2198, 0.19.2)."""
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
    """List the optimizers; a chain is a list (ChainedOptimizer.state_dict, optimizer.py)."""
    states = section if isinstance(section, list) else [section]
    return [s for s in states if isinstance(s, Mapping) and has_groups(s)]


def has_groups(state: Mapping[str, Any]) -> bool:
    """Whether the state dict of one Megatron optimizer has param_groups."""
    nested = (state.get("optimizer"), state.get("optimizer_state_dict"))
    return any("param_groups" in _as_mapping(s) for s in (state, *nested))


def _sharded(state: Mapping[str, Any]) -> bool:
    return state.get("param_state_sharding_type") is not None


def _as_mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _mapping(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise unexpected(path, f"a {type(value).__name__}", "a dict of Megatron's training state")
    _require_texts(value, path, "the training state")
    return value


def _scheduler(common: Mapping[str, Any], path: Path) -> Mapping[str, Any] | None:
    found = common.get("opt_param_scheduler", common.get("lr_scheduler"))
    if found is not None:
        if not isinstance(found, Mapping):
            raise unexpected(path, f"a {type(found).__name__}", "a dict of the scheduler's state")
        _require_texts(found, path, "the scheduler's state")
    return found


def _require_texts(found: Mapping[Any, Any], path: Path, what: str) -> None:
    for key in found:
        if not isinstance(key, str):
            raise unexpected(path, f"a key that is a {type(key).__name__} in {what}", "text")


def _foreign(directory: Path, names: list[str]) -> CheckpointError:
    if INDEX in names:
        return unexpected(
            directory,
            f"{INDEX} without {CONFIG} (torch_dcp or fsdp_dtensor)",
            "a checkpoint of the format torch_dist or torch",
            "Save it with --ckpt-format torch_dist",
        )
    return unexpected(
        directory,
        ", ".join(names[:6]) or "nothing",
        f"a Megatron checkpoint: {TRACKER}, {CONFIG} or mp_rank_* directories",
        "Check --load",
    )
