"""A new checkpoint directory that is there when it is complete, and not before."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import CheckpointError
from .stored import StoredCheckpoint


def require_new(target: Path, stored: StoredCheckpoint) -> None:
    """Check that a directory can be made from a checkpoint.

    Args:
        target: The new directory.
        stored: What it is made from.

    Raises:
        CheckpointError: There is something already, its parent is missing, or it would lie in
            the checkpoint.
    """
    if target.is_symlink() or (target.exists() and not _is_empty(target)):
        raise CheckpointError(f"{target} exists: choose a new directory")
    if not target.parent.is_dir():
        raise CheckpointError(f"{target.parent} does not exist: make it, or choose another target")
    if target.parent.resolve().is_relative_to(stored.root.resolve()):
        raise CheckpointError(f"{target} lies in the checkpoint itself: choose another target")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A temporary sibling that gets the target's name where the body ends.

    An error removes it. A process that is killed leaves it behind, under a name that begins with a
    dot, and no target. All is on the disk before the name is given.

    Args:
        target: What does not exist, or is an empty directory.

    Yields:
        The sibling.
    """
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())
        for directory, _, files in os.walk(partial, topdown=False):
            for name in files:
                _sync(Path(directory) / name)
            _sync(Path(directory))
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
