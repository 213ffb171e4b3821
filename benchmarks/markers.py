"""Put figures between two marks of docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
_END = "<!-- end of figures -->\n"


def filled(text: str, name: str, lines: Sequence[str]) -> str:
    """The text with the figures of a benchmark in their place.

    Raises:
        ValueError: It has no such place.
    """
    mark = f"<!-- figures of benchmarks/{name} -->\n"
    before, begin, rest = text.partition(mark)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name}: expected {mark!r} and {_END!r}, found no such lines")
    return before + begin + "\n".join(lines) + "\n" + end + after
