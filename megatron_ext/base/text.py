"""Text of messages: no control characters or terminal escapes, and lists that stay short."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from ..errors import printable as printable

#: Number of items of a list that a message names.
MAX_NAMED = 8


def first_of(items: Sequence[str]) -> str:
    """Join the first `MAX_NAMED` items of a list, and say how many more there are."""
    named = ", ".join(items[:MAX_NAMED])
    return named if len(items) <= MAX_NAMED else f"{named} and {len(items) - MAX_NAMED} more"


def suggestions(words: Iterable[str], known: Iterable[str]) -> str:
    """Write which known words are meant by unknown ones; empty if none is near.

    Args:
        words: The unknown words.
        known: All that there are.
    """
    pairs = [(word, difflib.get_close_matches(word, list(known), 1, 0.8)) for word in words]
    return "".join(f" Did you mean {near[0]} in place of {word}?" for word, near in pairs if near)
