"""Find a checkpoint that Megatron would not: one without its tracker file.

Without a tracker file Megatron starts from random weights, with exit status 0
(training/checkpointing.py:1690, 0.19.2).
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError
from . import torch_file
from .store import CONFIG, INDEX, LEGACY_FILE, TRACKER, read_file
from .stored import holds_checkpoint

_ITERATION = re.compile(r"iter_(\d{7,})")


def untracked(root: Path, flag: str) -> CheckpointError | None:
    """Return an error if a directory has a checkpoint and no tracker file; else None.

    An iteration whose save was not finished does not count: a job that ends in its first save
    starts again with the same command line.

    Args:
        root: The directory.
        flag: The flag that names it, for the error.

    Raises:
        OSError: The directory cannot be looked into.
    """
    if not root.is_dir() or holds_checkpoint(root):
        return None
    found = _ITERATION.fullmatch(root.name)
    if found is not None and _is_whole(root):
        return _one_iteration(root, int(found[1]), flag)
    numbered = ((p, _ITERATION.fullmatch(p.name)) for p in root.iterdir())
    known = [(int(m[1]), p, str(int(m[1]))) for p, m in numbered if m is not None]
    known.append((-1, root / "release", "release"))
    for _, directory, text in sorted(known, reverse=True):
        if directory.is_dir() and _is_whole(directory):
            return CheckpointError(
                f"{flag} {root}: {directory} is there, but no {TRACKER}, without which Megatron "
                f"does not find it and starts from random weights. Write {text} into "
                f"{root / TRACKER} to load it; if its save was not finished, remove "
                f"{directory.name}"
            )
    return None


def _one_iteration(directory: Path, number: int, flag: str) -> CheckpointError:
    parent = directory.resolve().parent if directory.parent == Path() else directory.parent
    remedy = f"Give {flag} {parent} --ckpt-step {number}"
    if not holds_checkpoint(parent):
        remedy = f"Write {number} into {parent / TRACKER} and give {flag} {parent}"
    return CheckpointError(
        f"{flag} {directory} is one iteration; expected the directory above it, or Megatron finds "
        f"no {TRACKER} and starts from random weights. {remedy}"
    )


def _is_whole(directory: Path) -> bool:
    """Whether a save was finished, as far as small reads tell: its index is written last."""
    if (directory / CONFIG).is_file() or (directory / INDEX).is_file():
        return True
    ranks = sorted(directory.glob("mp_rank_*"))
    try:
        for rank in ranks:
            read_file(rank / LEGACY_FILE, torch_file.require_torch_file)
    except CheckpointError:
        return False
    return bool(ranks)
