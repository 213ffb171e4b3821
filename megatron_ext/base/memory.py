"""Limit the memory that a block of code may take."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

#: Pages that this process has written to (proc(5), statm): the sixth number.
_STATM = Path("/proc/self/statm")


@contextlib.contextmanager
def limited(size: int) -> Iterator[None]:
    """Let an allocation raise MemoryError once this process has taken more memory than that.

    Python's unpickler and zip reader allocate what a file claims, which may be anything. The limit
    is the whole process's, so the block should be short.

    Args:
        size: Bytes that the block may take.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(_STATM.read_text().split()[5]) * resource.getpagesize() + size
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
