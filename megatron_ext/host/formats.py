"""Which checkpoints the installed Megatron can open."""

from __future__ import annotations

import shlex

from packaging.version import Version

from ..checkpoint.store import COMMON
from ..checkpoint.stored import StoredCheckpoint
from . import megatron

#: The first version that saves the state common to all ranks in the store, as the object
#: ``common_state`` (core/dist_checkpointing/serialization.py:439, 0.19.2). Earlier ones read it
#: from common.pt only (core/dist_checkpointing/strategies/common.py:41, 0.18.2; the same file since
#: 0.14). Every version from 0.16 on reads all else that one of them writes.
_COMMON_IN_STORE = Version("0.19")
#: With it the newer version writes the file that the earlier ones need. It still reads its own
#: checkpoint: it prefers the file (serialization.py:224, 0.19.2).
_WRITE_COMMON = (
    "import sys, torch; from megatron.core import dist_checkpointing as d; "
    f"torch.save(d.load_common_state_dict(sys.argv[1]), sys.argv[1] + '/{COMMON}')"
)


def written_since(stored: StoredCheckpoint) -> Version | None:
    """Return the first version that writes such a checkpoint; None if all tested ones do.

    Args:
        stored: The checkpoint.
    """
    if stored.store is None or (stored.directory / COMMON).is_file():
        return None
    return _COMMON_IN_STORE


def cannot_open(stored: StoredCheckpoint, version: Version | None = None) -> str | None:
    """Explain why a version of Megatron cannot open a checkpoint, and what to do.

    Args:
        stored: The checkpoint.
        version: The version; by default that of the Megatron of this process.

    Returns:
        None if it can.

    Raises:
        HostError: There is no Megatron.
    """
    since = written_since(stored)
    if since is None:
        return None
    version = megatron.find().version if version is None else version
    if version.release[:2] >= since.release[:2]:
        return None
    return (
        f"{stored.directory}: megatron-core {version} cannot open this checkpoint. megatron-core "
        f"{since} or later wrote it, without the file {COMMON} that earlier versions read. Resume "
        f"with megatron-core {since} or later, or let that version add the file: python -c "
        f'"{_WRITE_COMMON}" {shlex.quote(str(stored.directory))}'
    )
