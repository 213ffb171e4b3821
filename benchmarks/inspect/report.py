"""The results as JSON and Markdown, held against the targets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .measure import Result

#: Of one trillion parameters.
MOST_SECONDS = 10.0
MOST_BYTES = 2e9
#: At twice the size.
MOST_GROWTH = 2.2


def write(
    directory: Path, stem: str, facts: Mapping[str, Any], results: Sequence[Result]
) -> list[Path]:
    """Write both files; their paths."""
    files = [directory / f"{stem}.{ending}" for ending in ("json", "md")]
    rows = []
    for result in results:
        row = dataclasses.asdict(result)
        del row["document"]
        rows.append(row)
    content = {"facts": dict(facts), "results": rows, "targets": list(targets(results))}
    files[0].write_text(json.dumps(content, indent=1) + "\n")
    files[1].write_text(markdown(facts, results))
    return files


def targets(results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """Each figure with a target, and whether it is met."""
    groups: dict[Any, list[Result]] = {}
    for result in results:
        groups.setdefault(dataclasses.replace(result.case, elements=0), []).append(result)
    for once, twice in groups.values():
        name = f"{once.case.command}, {once.case.sharding}, {_plans(once)}"
        figures = (
            ("CPU seconds, with imports", once.all_seconds, MOST_SECONDS),
            ("peak memory in GB", once.peak / 1e9, MOST_BYTES / 1e9),
            (
                "time at twice the size / time, without imports",
                twice.seconds / once.seconds,
                MOST_GROWTH,
            ),
        )
        for what, found, most in figures:
            yield {"case": name, "figure": what, "found": found, "most": most, "met": found <= most}


def markdown(facts: Mapping[str, Any], results: Sequence[Result]) -> str:
    """For people."""
    lines = ["# Metadata of a trillion parameters", ""]
    lines += [
        "What `python -m megatron_ext` needs to read the index of a checkpoint that has no tensor "
        "data: a mixture of experts, written as megatron-core 0.19.2 writes it, with the plans of "
        "all ranks in the index and without. Medians of CPU time; peak memory is the largest. What "
        "the command said was held against the closed form.",
        "",
        "| figure | case | found | at most | |",
        "|---|---|---|---|---|",
    ]
    for t in targets(results):
        met = "met" if t["met"] else "**missed**"
        lines.append(f"| {t['figure']} | {t['case']} | {t['found']:.2f} | {t['most']:g} | {met} |")
    lines += [
        "",
        "| command | sharding | plans | parameters | s | s with imports | GB | MB of .metadata |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        c = r.case
        lines.append(
            f"| {c.command} | {c.sharding} | {'yes' if c.with_plans else 'no'} | "
            f"{c.elements:.4g} | {r.seconds:.2f} | {r.all_seconds:.2f} | {r.peak / 1e9:.2f} | "
            f"{r.index / 1e6:.0f} |"
        )
    lines += ["", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in facts.items()), ""]
    return "\n".join(lines)


def _plans(result: Result) -> str:
    return "with plans" if result.case.with_plans else "without plans"
