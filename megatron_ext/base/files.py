"""Replace a file or make a directory as a whole: complete, or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


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


def replace(target: Path, text: str) -> None:
    """Write a file in one go, or leave the one that is there.

    Args:
        target: The file; readable for all.
        text: Its content without the last newline.
    """
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    with os.fdopen(fd, "w", encoding="utf-8") as stream:
        stream.write(text + "\n")
    Path(name).chmod(0o644)
    Path(name).replace(target)
