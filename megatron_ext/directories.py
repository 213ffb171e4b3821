"""Which directory a phase loads from: where it starts, or its own once it holds a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .errors import PolicyError
from .phase import Where
from .stored import StoredCheckpoint, holds_checkpoint, open_checkpoint

#: Below the directory of --load (training/checkpointing.py, _NON_PERSISTENT_CKPT_SUBDIR).
NON_PERSISTENT = "non_persistent"


@dataclass(frozen=True)
class Directories:
    """What a run loads from and saves to.

    Args:
        load: What Megatron is to load from, or None.
        save: Where it saves, or None.
        where: What `load` is to the phase.
        start: ``--selective-from``, or None.
    """

    load: Path | None
    save: Path | None
    where: Where = "load"
    start: Path | None = None


def choose(load: str | None, save: str | None, start: str | None) -> Directories:
    """Decide what to load, from the arguments and from what lies on disk.

    Args:
        load: ``--load``.
        save: ``--save``.
        start: ``--selective-from``.

    Raises:
        PolicyError: The directories contradict each other.
    """
    paths = [None if d is None else Path(d) for d in (load, save, start)]
    load_dir, save_dir, start_dir = paths
    if start_dir is None:
        return Directories(load_dir, save_dir)
    if load_dir is not None and save_dir is not None and not _same(load_dir, save_dir):
        raise PolicyError(
            f"--selective-from {start} with --load {load} and --save {save}: expected one "
            "directory for --load and --save, the phase's own, or a restart would not find what "
            "was saved"
        )
    own = load_dir or save_dir
    if own is not None and _same(own, start_dir):
        raise PolicyError(
            f"--selective-from {start} is also the directory of --load or --save; expected another "
            "one, where the phase's own checkpoints go. Or leave --selective-from out"
        )
    if own is not None and any(map(holds_checkpoint, (own, own / NON_PERSISTENT))):
        return Directories(own, save_dir, "own", start_dir)
    return Directories(start_dir, save_dir, "start", start_dir)


def newest(root: Path, iteration: int | None = None) -> StoredCheckpoint | None:
    """The checkpoint that Megatron would load; None where there is none.

    Args:
        root: The directory of ``--load``.
        iteration: ``--ckpt-step``.

    Raises:
        CheckpointError: It cannot be read.
    """
    if iteration is not None:
        return open_checkpoint(root, iteration)
    found = [open_checkpoint(d) for d in (root, root / NON_PERSISTENT) if holds_checkpoint(d)]
    return max(found, key=lambda c: c.iteration, default=None)


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
