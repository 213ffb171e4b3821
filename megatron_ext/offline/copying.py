"""Copy the files of a checkpoint. No copy shares its blocks with the source in a way that shows.

Megatron opens the files of an iteration for writing where they are: a save into a directory whose
files are hard links rewrites the source too. A reflink shares blocks until one side is written.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from ..errors import CheckpointError

#: ``ioctl`` number of a reflink (FICLONE, linux/fs.h).
_FICLONE = 0x40049409
_BYTES_AT_A_TIME = 1 << 24

Way = Literal["linked", "cloned", "copied"]
Progress = Callable[[int], None]


def files_of(directory: Path, root: Path) -> list[Path]:
    """List the files in a directory, relative to it.

    Args:
        directory: The directory of an iteration.
        root: The checkpoint's directory; a symbolic link may lead to a file in it.

    Raises:
        CheckpointError: There is a symbolic link to something else, or a file that is no regular
            one, such as a pipe.
    """
    inside = (directory.resolve(), root.resolve())
    return [path.relative_to(directory) for path in _walk(directory, inside)]


def _walk(directory: Path, inside: tuple[Path, ...]) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        real = path.resolve()
        leads_out = not any(real.is_relative_to(one) for one in inside)
        if path.is_symlink() and (leads_out or not real.is_file()):
            raise CheckpointError(
                f"{path}: expected a file of the checkpoint, found a symbolic link to {real}. It "
                "is not copied, because it may lead to anything. Put the file itself there if it "
                "belongs to the checkpoint, or remove the link"
            )
        if path.is_dir():
            yield from _walk(path, inside)
        elif stat.S_ISREG(path.stat().st_mode):
            yield path
        else:
            raise CheckpointError(
                f"{path}: expected a regular file, found a pipe, a socket or a device. It is no "
                "part of a checkpoint: remove it"
            )


def copy(
    source: Path, target: Path, progress: Progress | None = None, *, hard_link: bool = False
) -> Way:
    """Copy a file with its times and permissions, as a reflink where the file system has them.

    Args:
        source: The file, or a symbolic link to it.
        target: A path in a directory that exists.
        progress: Called with the number of bytes just copied.
        hard_link: Make a hard link if the file system allows it.

    Returns:
        How it was done.

    Raises:
        CheckpointError: The target cannot be written.
        OSError: The file cannot be read.
    """
    source, way = source.resolve(), "copied"
    size = source.stat().st_size
    if hard_link and _link(source, target):
        way = "linked"
    else:
        with source.open("rb") as old, opened(target) as new:
            if _clone(old.fileno(), new.fileno()):
                way = "cloned"
            else:
                size = 0
                while data := old.read(_BYTES_AT_A_TIME):
                    new.write(data)
                    if progress is not None:
                        progress(len(data))
        shutil.copystat(source, target)
    if progress is not None and size:
        progress(size)
    return way  # type: ignore[return-value]


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a new file for writing.

    Raises:
        CheckpointError: It cannot be written. torch makes a RuntimeError of the system's error.
    """
    try:
        with path.open("xb") as file:
            yield file
    except (RuntimeError, OSError) as e:
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise CheckpointError(
            f"{path.name} cannot be written: {cause.strerror or cause}. Nothing was left behind: "
            "make room, or choose another directory"
        ) from e


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links: a copy tells what is wrong else
        return False
    return True


def _clone(old: int, new: int) -> bool:
    try:
        fcntl.ioctl(new, _FICLONE, old)
    except OSError:
        return False
    return True
