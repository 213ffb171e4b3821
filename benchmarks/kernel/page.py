"""The newest results, for docs/performance.md: ``python -m benchmarks.kernel.page``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .. import markers
from ..markers import PAGE, RESULTS
from .targets import verdicts

DEVICES = ("cuda", "cpu")


def newest(device: str) -> Path | None:
    """The newest result of a device."""
    found = sorted(RESULTS.glob(f"????-??-??-{device}-*.json"))
    return found[-1] if found else None


def lines() -> Iterator[str]:
    """A table of the targets for each device, or that it has not been measured."""
    for device in DEVICES:
        path = newest(device)
        if path is None:
            yield f"{device}: not run"
            yield ""
            continue
        result = json.loads(path.read_text())
        facts = result["environment"]
        name = facts.get("GPU", facts["CPU"])
        what = f"{result['date']}, {name}, torch {facts['torch']}"
        yield f"{what} (`benchmarks/results/{path.stem}.md`):"
        yield ""
        yield "| figure | measured | target | |"
        yield "|---|---|---|---|"
        for v in verdicts(result):
            if v.verdict in ("met", "missed"):
                measured = v.measured if v.measured != "-" else v.ours
                yield f"| {v.figure} | {measured} | {v.target} | {v.verdict} |"
        yield ""


if __name__ == "__main__":
    PAGE.write_text(markers.filled(PAGE.read_text(), "kernel", list(lines())[:-1]))
