"""Text of messages: no control characters or terminal escapes, and lists that stay short."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import printable as printable

#: Number of items of a list that a message names.
MAX_NAMED = 8


def first_of(items: Sequence[str]) -> str:
    """Join the first `MAX_NAMED` items of a list, and say how many more there are."""
    named = ", ".join(items[:MAX_NAMED])
    return named if len(items) <= MAX_NAMED else f"{named} and {len(items) - MAX_NAMED} more"
