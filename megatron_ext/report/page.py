"""Make the HTML page of a report from its JSON document."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from ..base.text import printable
from .page_tables import (
    Document,
    counters_table,
    environment_table,
    first_step_table,
    optimizer_section,
    phase_table,
    scheduler_table,
    text_of,
)
from .plots import Plots

_TEMPLATE = "templates/resume-report.html"
_STATES = {
    "applied": "Transition applied",
    "continued": "Continued",
    "none": "Resumed",
}


def html_page(document: Document, plots: Plots | None = None) -> str:
    """Make the HTML page of a report.

    Args:
        document: The result of `ResumeReport.to_json`, or the content of ``resume-report.json``.
        plots: The result of `megatron_ext.report.plots.draw`. Its SVG elements are not escaped.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: The document is not a report.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    plots = plots or Plots()

    def shown(value: Any) -> Any:
        return value if isinstance(value, Markup) else printable(text_of(value))

    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string(
        files("megatron_ext").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    )
    drawn = {"schedule": plots.schedule, "moments": plots.moments}
    return template.render(
        title=_title(document),
        time=(document.get("environment") or {}).get("time"),
        state=(document["phase"] or {}).get("state", "none"),
        summary=_summary(document),
        warnings=_warnings(document),
        counters=counters_table(document),
        first_step=first_step_table(document),
        scheduler=scheduler_table(document),
        optimizers=[optimizer_section(o) for o in document["optimizers"]],
        phase=phase_table(document),
        policy=json.dumps(document["policy"], indent=2, ensure_ascii=False).split("\n"),
        environment=environment_table(document),
        plots={name: Markup(svg) for name, svg in drawn.items()},
        absent=plots.absent,
    )


def _title(document: Document) -> str:
    phase = document["phase"] or {"state": "none", "name": None}
    name = f": phase {phase['name']}" if phase["name"] else ""
    return f"{_STATES[phase['state']]}{name}"


def _summary(document: Document) -> list[str]:
    """Summarize the resume in three lines: its source, its continuation and its warnings."""
    return [_from_where(document), _goes_on(document), _to_look_at(document)]


def _from_where(document: Document) -> str:
    phase = document["phase"] or {}
    source = phase.get("checkpoint")
    loaded = f"Loaded {source}" if source else "Loaded a checkpoint"
    operations = ", ".join(phase.get("operations", ())) or "no change of state"
    if phase.get("state") == "applied":
        return f"{loaded}. A phase begins here with: {operations}."
    if phase.get("state") == "continued":
        begun = phase["from"]
        return f"{loaded}. The phase that started from {begun} continues; no operation is repeated."
    return f"{loaded}. Hyperparameters were decided; the state is unchanged."


def _goes_on(document: Document) -> str:
    counters, scheduler = document["counters"], document["scheduler"]
    where = "The run continues"
    if counters is not None:
        iteration, samples = counters["iteration"], counters["consumed_train_samples"]
        where += f" at iteration {iteration['value']}, sample {samples['value']}"
    if scheduler is None or not scheduler["first_step"]:
        return f"{where}."
    rates = sorted({first["lr"] for first in scheduler["first_step"]})
    span = " to ".join(map(text_of, [rates[0], rates[-1]] if len(rates) > 1 else rates))
    saved, used = (scheduler["values"]["max_lr"][side] for side in ("checkpoint", "value"))
    change = f"max_lr {text_of(saved)} -> {text_of(used)}" if saved != used else "max_lr as before"
    return f"{where}, with learning rate {span} in the first step ({change})."


def _to_look_at(document: Document) -> str:
    count = len(_warnings(document))
    said = {0: "No warnings", 1: "One warning: it is below"}
    kept = all(o["moments"] is None for o in document["optimizers"])
    moments = "All moments are the checkpoint's" if kept else "Moments were changed by rules"
    return f"{moments}. {said.get(count, f'{count} warnings: they are below')}."


def _warnings(document: Document) -> list[str]:
    chained = len(document["optimizers"]) > 1
    return [
        f"optimizer {number}: {warning}" if chained else warning
        for number, optimizer in enumerate(document["optimizers"])
        for warning in optimizer["warnings"]
    ]
