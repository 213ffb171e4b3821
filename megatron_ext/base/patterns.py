"""Patterns of parameter names, as policies write them."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable

from .regex import Regex
from .regex_parser import MAX_LENGTH, Parser, PatternError

#: More than the patterns of any policy: none is compiled twice.
_KEPT = 4096


@functools.lru_cache(maxsize=_KEPT)
def compiled(pattern: str) -> Callable[[str], object]:
    """Compile a pattern once; translating a glob takes most of the time of a match.

    Args:
        pattern: A glob (``*`` also matches dots) or, after ``re:``, a regular expression. Either
            has to match the whole name.

    Returns:
        A function that says whether a name matches. Its time grows linearly with the name.

    Raises:
        PatternError: The pattern is malformed, too long, or cannot be matched in linear time.
    """
    if pattern.startswith("re:"):
        try:
            return _expression(pattern[3:])
        except PatternError as e:
            raise PatternError(f"{e}; without 're:' it is a glob") from None
    if len(pattern) > MAX_LENGTH:
        raise PatternError(f"it has {len(pattern)} characters; expected at most {MAX_LENGTH}")
    # The text between two stars is looked for once: fnmatch makes an atomic group of it.
    return re.compile(fnmatch.translate(pattern)).fullmatch


def _expression(text: str) -> Callable[[str], bool]:
    """Compile a regular expression, which may begin with ``(?!...)`` for all names but some."""
    begin = "(?!"
    if not text.startswith(begin):
        return Regex(text).fits
    inner, rest = Parser(text).group_at(len(begin))
    excluded, others = Regex(f"(?:{inner})[\\s\\S]*"), _expression(rest)
    if not rest.startswith(begin) and len(Parser(rest).parse()[1]) > 1:
        raise PatternError(f"put the choice after {text[: -len(rest)]!r} into parentheses")
    return lambda name: others(name) and not excluded.fits(name)
