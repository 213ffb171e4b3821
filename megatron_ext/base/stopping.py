"""End a rank with one message before there is a process group.

Rank 0 prints the message. All ranks usually have the same error, so that each other rank prints one
line. Under torchrun the error is recorded, and its summary shows that of the first rank that ended.

Environment:
    RANK: set by torchrun; 0 without it.
    TORCHELASTIC_ERROR_FILE: set by torchrun; where an error is recorded for its summary.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import NoReturn

from ..errors import MegatronExtError

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
#: Characters of a message that ranks other than 0 print.
_EXCERPT = 200
#: Seconds that these ranks wait. torchrun ends all ranks with the first and shows its error, and
#: rank 0 is the slowest, because it reads the checkpoint.
_PATIENCE = 5.0


def rank() -> int:
    """Return this process's rank, before and after there is a process group."""
    return int(os.environ.get("RANK", "0"))


def stop(prog: str, error: MegatronExtError, *, told: bool = False) -> NoReturn:
    """End this rank with exit status 2.

    Args:
        prog: The program's name, for the message.
        error: The reason.
        told: Whether rank 0 has printed it already.
    """
    if told and rank() == 0:
        print(f"{prog}: all ranks stop, because of the error above", file=sys.stderr, flush=True)
    else:
        print_error(prog, error)
    if _ERROR_FILE in os.environ:
        if rank() != 0:
            time.sleep(_PATIENCE)
        _record(error)
    sys.exit(2)


def _record(error: MegatronExtError) -> None:
    """Write the error to where torchrun's summary takes it from."""
    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def refuse() -> NoReturn:
        raise error.with_traceback(None) from None

    with contextlib.suppress(MegatronExtError):
        refuse()


def print_error(prog: str, error: MegatronExtError) -> None:
    """Print an error on stderr: on rank 0 as it is, on others the beginning in one line."""
    text = f"{prog}: error: {error}"
    if rank() != 0:
        line = " ".join(str(error).split())
        line = line if len(line) <= _EXCERPT else f"{line[:_EXCERPT]} ..."
        text = f"{prog}: error on rank {rank()}: {line} (rank 0 prints the whole message)"
    print(text, file=sys.stderr, flush=True)
