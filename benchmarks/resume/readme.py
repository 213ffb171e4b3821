"""Put the figures of the newest result into the README: ``python -m benchmarks.resume.readme``."""

from __future__ import annotations

import json
from pathlib import Path

from .report import figures

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_BEGIN, _END = "<!-- figures of benchmarks/resume -->\n", "<!-- end of figures -->\n"


def newest() -> Path | None:
    """The newest result that the README may quote."""
    found = sorted(RESULTS.glob("*-resume-*.json"))
    return found[-1] if found else None


def filled(text: str, result: Path) -> str:
    """The README with the figures of a result between its two markers.

    Raises:
        ValueError: It has no such place.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"README.md: expected {_BEGIN!r} and {_END!r}, found no such lines")
    content = json.loads(result.read_text())
    facts = content["facts"]
    lines = [
        f"[{facts['date']}, {facts['CPU']}](benchmarks/results/{result.stem}.md), medians with "
        "bootstrap 95% intervals:",
        "",
        *figures(content),
    ]
    return before + begin + "\n".join(lines) + "\n" + end + after


if __name__ == "__main__":
    readme, source = ROOT / "README.md", newest()
    if source is None:
        raise SystemExit(f"{RESULTS}: expected a result of benchmarks.resume, found none")
    readme.write_text(filled(readme.read_text(), source))
