"""Resumes of a changed model."""

from __future__ import annotations

from typing import Any

from . import harness, policies
from .harness import Hyper, Layout
from .mapped_stock import result


def resumed(
    layout: Layout, hyper: Hyper, directory: str, policy: str, more: int, save_to: str | None = None
) -> dict[str, Any]:
    """What is loaded, what the next steps make of it, and what the log says; or the error."""
    run = policies.build(layout, hyper, policy)
    try:
        harness.load(run, directory)
    except Exception as e:
        return {"error": policies._error(e, "load", True)}
    loaded = result(run)
    harness.train(run, more)
    if save_to is not None:
        harness.save(run, save_to)
    report = policies._report(run)
    return {
        "loaded": loaded,
        "final": result(run),
        "losses": run.losses,
        "lines": report.lines(),
        "report": report.to_json(),
    }
