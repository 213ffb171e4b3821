"""Put the figures of the newest result into the README: ``python -m benchmarks.resume.readme``."""

from __future__ import annotations

import json
from pathlib import Path

from .. import markers
from ..markers import RESULTS, ROOT
from .report import figures


def newest() -> Path | None:
    """The newest result that the README may quote."""
    found = sorted(RESULTS.glob("*-resume-*.json"))
    return found[-1] if found else None


def filled(text: str, result: Path) -> str:
    """The README with the figures of a result between its two markers.

    Raises:
        ValueError: It has no such place.
    """
    content = json.loads(result.read_text())
    facts = content["facts"]
    lines = [
        f"[{facts['date']}, {facts['CPU']}](benchmarks/results/{result.stem}.md), medians with "
        "bootstrap 95% intervals:",
        "",
        *figures(content),
    ]
    return markers.filled(text, "resume", lines)


if __name__ == "__main__":
    readme, source = ROOT / "README.md", newest()
    if source is None:
        raise SystemExit(f"{RESULTS}: expected a result of benchmarks.resume, found none")
    readme.write_text(filled(readme.read_text(), source))
