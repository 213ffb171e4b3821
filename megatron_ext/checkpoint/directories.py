"""Choose the directory that a phase loads from: its start, or its own once it has a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, PolicyError
from .state import DirectoryRole
from .stored import StoredCheckpoint, holds_checkpoint, open_checkpoint
from .untracked import untracked

#: Below the directory of --load (training/checkpointing.py, _NON_PERSISTENT_CKPT_SUBDIR).
NON_PERSISTENT = "non_persistent"


@dataclass(frozen=True)
class Directories:
    """The directories that a run loads from and saves to.

    Args:
        load: The directory that Megatron is to load from, or None.
        save: The directory that it saves to, or None.
        where: Role of `load` in the phase.
        start: ``--selective-from``, or None.
    """

    load: Path | None
    save: Path | None
    where: DirectoryRole = "load"
    start: Path | None = None


@dataclass(frozen=True)
class Names:
    """What a user calls the directories, for errors.

    Args:
        load: The directory to load from.
        save: The directory to save to.
        start: The directory in which a phase starts.
        elsewhere: The directory of non-persistent checkpoints.
    """

    load: str = "--load"
    save: str = "--save"
    start: str = "--selective-from"
    elsewhere: str = "--non-persistent-global-ckpt-dir"


#: What users of the launcher call them.
FLAGS = Names()


def choose(
    load: str | None,
    save: str | None,
    start: str | None,
    elsewhere: str | None = None,
    *,
    names: Names = FLAGS,
    found: Callable[[Path], bool] | None = None,
) -> Directories:
    """Decide which directory to load, from the arguments and the files on disk.

    Args:
        load: ``--load``.
        save: ``--save``.
        start: ``--selective-from``.
        elsewhere: ``--non-persistent-global-ckpt-dir``.
        names: Their names in errors.
        found: Whether the host finds a checkpoint in a directory; `holds` by default.

    Raises:
        PolicyError: The directories contradict each other.
        CheckpointError: One of them cannot be looked into, or has lost its tracker file.
    """
    paths = [None if d is None else Path(d) for d in (load, save, start)]
    load_dir, save_dir, start_dir = paths
    if start_dir is None:
        return Directories(load_dir, save_dir)
    if remote := [d for d in (load, save, start) if is_remote(d)]:
        raise PolicyError(
            f"{names.start} {start}: {remote[0]} is in a remote storage; expected directories "
            "of a file system, to see which of them holds a checkpoint"
        )
    if elsewhere is not None:
        raise PolicyError(
            f"{names.start} {start} with {names.elsewhere} {elsewhere}: a checkpoint there may be "
            "of the earlier phase or of the new one. Leave the second one out: non-persistent "
            f"checkpoints then go to {NON_PERSISTENT} below {names.save}"
        )
    if load_dir is not None and save_dir is not None and not _same(load_dir, save_dir):
        raise PolicyError(
            f"{names.start} {start} with {names.load} {load} and {names.save} {save}: expected one "
            f"directory for {names.load} and {names.save}, the phase's own, or a restart would not "
            "find what was saved"
        )
    own = load_dir or save_dir
    if own is not None and _same(own, start_dir):
        raise PolicyError(
            f"{names.start} {start} is also the directory of {names.load} or {names.save}; "
            "expected another one, where the phase's own checkpoints go. Or leave "
            f"{names.start} out"
        )
    if own is not None and any(map(found or holds, (own, own / NON_PERSISTENT))):
        return Directories(own, save_dir, "own", start_dir)
    if own is not None:
        require_tracked(own, names.save if load_dir is None else names.load)
    return Directories(start_dir, save_dir, "start", start_dir)


def newest(
    root: Path, iteration: int | None = None, non_persistent: Path | None = None
) -> StoredCheckpoint | None:
    """Open the checkpoint that Megatron would load; None if there is none.

    It is chosen as in _load_base_checkpoint (training/checkpointing.py:1648-1676, 0.19.2).

    Args:
        root: The directory of ``--load``.
        iteration: ``--ckpt-step``.
        non_persistent: The directory of non-persistent checkpoints, if Megatron looks for them.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    found = None
    try:
        if iteration is not None or holds(root):
            found = open_checkpoint(root, iteration)
        if non_persistent is not None and holds(non_persistent):
            other = open_checkpoint(non_persistent)
            found = other if found is None or other.iteration >= found.iteration else found
    except OSError as e:
        raise _not_accessible(root, e) from e
    return found


def name_of(root: str | Path) -> str:
    """Name a checkpoint directory in messages, by the last two parts of its path."""
    return "/".join(Path(root).resolve().parts[-2:]).lstrip("/")


def holds(directory: Path) -> bool:
    """Whether a directory holds a checkpoint.

    Raises:
        CheckpointError: The directory cannot be looked into.
    """
    try:
        return holds_checkpoint(directory)
    except OSError as e:
        raise _not_accessible(directory, e) from e


def require_tracked(directory: Path, flag: str) -> None:
    """Refuse a directory with a checkpoint that Megatron would not find.

    Args:
        directory: The directory.
        flag: The flag that names it.

    Raises:
        CheckpointError: There is a checkpoint without a tracker file, or the directory cannot be
            looked into.
    """
    try:
        error = untracked(directory, flag)
    except OSError as e:
        raise _not_accessible(directory, e) from e
    if error is not None:
        raise error


def is_remote(directory: str | None) -> bool:
    """Whether a directory is a URL, which Megatron opens with multistorageclient."""
    return directory is not None and "://" in directory


def _not_accessible(directory: Path, cause: OSError) -> CheckpointError:
    return CheckpointError(
        f"{directory} cannot be looked into: {type(cause).__name__}: {cause}; expected a directory "
        "that this user may read. Correct its permissions, or name another one"
    )


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
