"""Patterns of parameter names, as policies write them."""

from __future__ import annotations

import fnmatch
import functools
import re


@functools.lru_cache(maxsize=256)
def compiled(pattern: str) -> re.Pattern[str]:
    """Compile a pattern once; translating a glob takes most of the time of a match.

    Args:
        pattern: A glob (``*`` also matches dots) or, after ``re:``, a regular expression. Either
            has to match the whole name.

    Raises:
        re.error: The regular expression does not compile.
    """
    return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))
