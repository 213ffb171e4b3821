"""Which checkpoints the installed Megatron can open."""

from __future__ import annotations

import shlex
from pathlib import Path

from packaging.version import Version

from . import megatron

#: The first version that saves the state common to all ranks in the store, as the object
#: ``common_state`` (core/dist_checkpointing/serialization.py:439, 0.19.2). Earlier ones read it
#: from common.pt only (core/dist_checkpointing/strategies/common.py:41, 0.18.2; the same file since
#: 0.14). Every version from 0.16 on reads all else that one of them writes.
COMMON_IN_STORE = Version("0.19")
#: With it the newer version writes the file that the earlier ones need. It still reads its own
#: checkpoint: it prefers the file (serialization.py:224, 0.19.2).
_WRITE_COMMON = (
    "import sys, torch; from megatron.core import dist_checkpointing as d; "
    "torch.save(d.load_common_state_dict(sys.argv[1]), sys.argv[1] + '/common.pt')"
)


def cannot_open(directory: Path, version: Version | None = None) -> str | None:
    """Explain why a version of Megatron cannot open a checkpoint without common.pt.

    Args:
        directory: The directory of the iteration, whose common state is in the store.
        version: The version; by default that of the Megatron of this process.

    Returns:
        The reason, and what to do; None if it can.

    Raises:
        HostError: There is no Megatron.
    """
    version = megatron.find().version if version is None else version
    if version.release[:2] >= COMMON_IN_STORE.release[:2]:
        return None
    return (
        f"{directory}: megatron-core {version} cannot open this checkpoint. megatron-core "
        f"{COMMON_IN_STORE} or later wrote it, without the file common.pt that earlier versions "
        f"read. Resume with megatron-core {COMMON_IN_STORE} or later, or let that version add the "
        f'file: python -c "{_WRITE_COMMON}" {shlex.quote(str(directory))}'
    )
