"""What a wrong save has stored of a buffer, and under which names. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .shifted_layout import Part, Place


@dataclass(frozen=True)
class Source:
    """Where elements of a parameter are stored.

    Args:
        first: The first element, in the parameter.
        number: Position in the buffer's order of the parameter under whose name they are stored.
        begin: The first element under that name.
        elements: How many.
    """

    first: int
    number: int
    begin: int
    elements: int


def sources(parts: Sequence[Part], places: Sequence[Place]) -> list[list[Source]]:
    """Find where the elements of each parameter are stored; what is not listed is lost.

    Args:
        parts: The parameters of a buffer in its order.
        places: Their places.
    """
    found: list[list[Source]] = []
    at = 0
    for place in places:
        low, high = place.begin - place.shift, place.end - place.shift
        mine = []
        while at < len(places) and places[at].end <= low:
            at += 1
        for number in range(at, len(places)):
            window = places[number]
            begin, end = max(low, window.begin), min(high, window.end)
            if window.begin >= high:
                break
            if parts[number].stored and begin < end:
                mine.append(Source(begin - low, number, begin - window.begin, end - begin))
        found.append(mine)
    return found


def gathered(places: Sequence[Place]) -> int:
    """Return the length of the gathered buffer; zeros are stored for what lies behind it."""
    return places[-1].end - places[-1].shift
