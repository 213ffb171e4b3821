"""Replace a file or make a directory atomically: a reader finds all of it or none of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory, which is renamed to the target when the body ends.

    Every file is synced to disk before the rename. If the body raises, the sibling is removed. A
    process that is killed leaves the sibling, whose name begins with a dot, and no target.

    Args:
        target: A path that does not exist, or an empty directory.

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


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a file for reading. A pipe or a device, which may never end, is an error.

    Args:
        path: The file, or a link to it.
        buffering: As for `open`.

    Raises:
        OSError: It cannot be opened, or is no regular file.
    """
    # A pipe would be waited for without the flag; it changes nothing for a regular file.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise OSError("it is a pipe, a socket or a device; expected a regular file")
        return open(descriptor, "rb", buffering)
    except BaseException:
        os.close(descriptor)
        raise


def replace(target: Path, text: str) -> None:
    """Write a file atomically: after an error the old one is still there.

    Args:
        target: The file. All users may read it.
        text: Its content without the final newline.
    """
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as stream:
            stream.write(text + "\n")
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def check_writable(directory: Path) -> None:
    """Make a directory, and write and remove a file in it.

    Raises:
        OSError: That is not possible.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=directory, suffix=".tmp") as stream:
        stream.write("a line\n")
