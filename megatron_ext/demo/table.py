"""Show the demo's results as a table. Every figure comes from the log of a run."""

from __future__ import annotations

from collections.abc import Sequence

from .runs import Run

_HEAD = ("phase 2", "optimizer", "lr, first logged", "loss 1st", "loss 10th", "loss last")

FOOTNOTE = (
    "Megatron logs the learning rate after the scheduler's step: the first logged one is that of "
    "the second resumed step."
)


def rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Build one row per run, below the head."""
    return [_HEAD, *(_row(run) for run in runs)]


def markdown(runs: Sequence[Run]) -> str:
    """Write the table for a README, with the footnote."""
    head, *body = rows(runs)
    lines = [_line(head), _line(("---",) * len(head)), *(_line(row) for row in body)]
    return "\n".join([*lines, "", FOOTNOTE, ""])


def text(runs: Sequence[Run]) -> str:
    """Write the table for a terminal, with aligned columns."""
    table = rows(runs)
    widths = [max(len(row[i]) for row in table) for i in range(len(_HEAD))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], "", FOOTNOTE])


def _row(run: Run) -> tuple[str, ...]:
    if run.returncode or not run.points:
        return (run.name, f"failed: {run.error or 'see ' + run.log.name}", "-", "-", "-", "-")
    points = run.points
    tenth = f"{points[9].loss:.4f}" if len(points) > 9 else "-"
    loaded = "moments reset" if "--selective-preset" in run.command else "loaded"
    losses = (f"{points[0].loss:.4f}", tenth, f"{points[-1].loss:.4f}")
    return (run.name, loaded, f"{points[0].lr:.3e}", *losses)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
