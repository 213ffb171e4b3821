"""The newest result, for docs/performance.md: ``python -m benchmarks.resume.page``."""

from __future__ import annotations

import json
from pathlib import Path

from .. import markers
from ..markers import PAGE, RESULTS
from .report import figures


def newest() -> Path | None:
    """The newest result that the page may quote."""
    found = sorted(RESULTS.glob("*-resume-*.json"))
    return found[-1] if found else None


def filled(text: str, result: Path) -> str:
    """The page with the figures of a result between its two markers.

    Raises:
        ValueError: It has no such place.
    """
    content = json.loads(result.read_text())
    facts = content["facts"]
    lines = [
        f"{facts['date']}, {facts['CPU']} (`benchmarks/results/{result.stem}.md`), medians with "
        "bootstrap 95% intervals:",
        "",
        *figures(content),
    ]
    return markers.filled(text, "resume", lines)


if __name__ == "__main__":
    source = newest()
    if source is None:
        raise SystemExit(f"{RESULTS}: expected a result of benchmarks.resume, found none")
    PAGE.write_text(filled(PAGE.read_text(), source))
