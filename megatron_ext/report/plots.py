"""Draw the plots of the resume report's page: the schedule of both phases, and the moments.

The report's JSON document has the numbers. If a plot cannot be drawn, the others still are, and the
page has the reason.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..errors import PlanError
from ..host.schedule import ScheduleValues
from .curves import Curve, Span, phase_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Keys of a param_group that take precedence over the scheduler's own values.
_OF_GROUP = ("max_lr", "min_lr", "start_wd", "end_wd", "wd_mult", "lr_mult")
#: Values without which a checkpoint's scheduler cannot be run.
_NEEDED = ("max_lr", "min_lr", "lr_decay_steps", "lr_decay_style")
_BEFORE, _AFTER = "#999999", "#0072B2"


@dataclass(frozen=True)
class Plots:
    """The plots of the page.

    Args:
        schedule: SVG element of learning rate and weight decay; empty if it cannot be drawn.
        moments: SVG element of the moments before and after; empty if they were kept.
        absent: The reasons why plots are missing, as sentences.
    """

    schedule: str = ""
    moments: str = ""
    absent: tuple[str, ...] = ()


def draw(document: Mapping[str, Any]) -> Plots:
    """Draw the plots that the document has the numbers for. Does not raise.

    Args:
        document: The result of `ResumeReport.to_json`.
    """
    absent: list[str] = []

    def attempt(what: str, make: Callable[[], str]) -> str:
        try:
            return make()
        except PlanError as e:
            absent.append(f"no plot of {what}: {e}")
        except Exception as e:  # matplotlib or a foreign document may cause any exception
            absent.append(f"no plot of {what}: {type(e).__name__}: {e}")
        return ""

    schedule = attempt("the schedule", lambda: _schedule(document))
    moments = attempt("the moments", lambda: _moments(document))
    return Plots(schedule, moments, tuple(absent))


def curves_of(document: Mapping[str, Any]) -> tuple[Curve, ...]:
    """Compute the learning rate and weight decay of every param_group in both phases.

    Args:
        document: The result of `ResumeReport.to_json`.

    Returns:
        The curves of phase 1, if the checkpoint has its scheduler's values, and those of phase 2.
        Phase 1 ends and phase 2 begins at the resume.

    Raises:
        PlanError: The document lacks numbers for the curves of phase 2.
    """
    scheduler, counters = document["scheduler"], document["counters"]
    if scheduler is None or counters is None:
        raise PlanError("Megatron's training loop and scheduler have not loaded the checkpoint")
    first, last = counters["iteration"]["value"], scheduler.get("train_iters")
    batch = scheduler.get("global_batch_size") or {"checkpoint": None, "value": None}
    if last is None or batch["value"] is None:
        raise PlanError("the batch size ramps up, or the run's length is not known")
    if last <= first:
        raise PlanError(f"the run ends at iteration {last} and resumes at {first}")
    position = scheduler["num_steps"]
    span = Span(first, last, position, position + (last - first) * batch["value"])
    out = list(_before(document, batch["checkpoint"]))
    groups = [[_bounds(g, "value") for g in o["groups"]] for o in document["optimizers"]]
    out += phase_curves("this run", 2, _schedule_values(scheduler, "value"), groups, span)
    return tuple(out)


def _before(document: Mapping[str, Any], batch: int | None) -> tuple[Curve, ...]:
    """Compute the curves of the checkpoint's run; empty if its scheduler is not known."""
    scheduler, counters = document["scheduler"], document["counters"]
    done, position = (counters[key]["checkpoint"] for key in ("iteration", "num_steps"))
    if not done or not position or any(_saved(scheduler, name) is None for name in _NEEDED):
        return ()
    places = [
        [
            (g["index"], _bounds(g, "checkpoint"))
            for g in o["groups"]
            if g["saved_index"] is not None
        ]
        for o in document["optimizers"]
    ]
    # When the iterations were reset to 0, the scheduler may or may not have been restarted.
    begin = max(0, position - done * batch) if batch else 0
    try:
        curves = phase_curves(
            "checkpoint",
            1,
            _schedule_values(scheduler, "checkpoint"),
            [[bounds for _, bounds in groups] for groups in places],
            Span(0, done, begin, position),
        )
    except PlanError:  # another version of Megatron may have saved other values
        return ()
    return tuple(replace(c, group=places[c.optimizer][c.group][0]) for c in curves)


def _saved(scheduler: Mapping[str, Any], name: str) -> Any:
    return scheduler["values"].get(name, {}).get("checkpoint")


def _schedule_values(scheduler: Mapping[str, Any], side: str) -> Any:
    """Build the scheduler's arguments. Values that are not saved are assumed to be unchanged."""
    known = {f.name for f in fields(ScheduleValues)}
    values = {name: v for name, v in scheduler["values"].items() if name in known}
    chosen = {name: v["value"] if v[side] is None else v[side] for name, v in values.items()}
    return ScheduleValues(**{name: v for name, v in chosen.items() if v is not None})


def _bounds(group: Mapping[str, Any], side: str) -> dict[str, Any]:
    keys = group["keys"]
    found = {name: keys[name][side] for name in _OF_GROUP if name in keys}
    return {name: float(value) for name, value in found.items() if value is not None}


def _schedule(document: Mapping[str, Any]) -> str:
    from .figures import curves_figure, svg

    figure = curves_figure(curves_of(document))
    return inline(svg(figure), "schedule", "learning rate and weight decay over the iterations")


def _moments(document: Mapping[str, Any]) -> str:
    from .figures import svg

    states = [
        (number, optimizer["moments"]["state"])
        for number, optimizer in enumerate(document["optimizers"])
        if optimizer["moments"] is not None
    ]
    if not states:
        return ""
    label = "root mean square of the moments before and after"
    return inline(svg(_moments_figure(states)), "moments", label)


def _moments_figure(states: Sequence[tuple[int, Mapping[str, Any]]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.3 + 0.75 * len(states)), dpi=100, layout="constrained")
    tensors = list(dict.fromkeys(key for _, state in states for key in state))
    (every,) = figure.subplots(1, len(tensors), squeeze=False)
    for axes, key in zip(every, tensors, strict=True):
        held = [(number, state[key]) for number, state in states if key in state]
        axes.set_title(f"RMS of {key}", fontsize=10)
        _bars(axes, [state for _, state in held])
        axes.set_yticks(range(len(held)), [f"optimizer {number}" for number, _ in held])
        axes.set_ylim(len(held) - 0.4, -0.6)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useOffset=False)
        axes.grid(axis="x", alpha=0.25)
    every[0].legend(*every[0].get_legend_handles_labels(), fontsize=8, frameon=False, ncols=2)
    return figure


def _bars(axes: Axes, states: Sequence[Mapping[str, Any]]) -> None:
    """Draw a pair of horizontal bars for each optimizer, with the numbers."""
    sides = (("rms_before", -0.19, _BEFORE, "before"), ("rms_after", 0.19, _AFTER, "after"))
    numbers = [[_number(state[name]) for state in states] for name, *_ in sides]
    finite = [x for side in numbers for x in side if x is not None and math.isfinite(x)]
    axes.set_xlim(0, 1.35 * max(finite, default=0) or 1)
    for (_, shift, colour, label), values in zip(sides, numbers, strict=True):
        lengths = [x if x is not None and math.isfinite(x) else 0.0 for x in values]
        at = [i + shift for i in range(len(values))]
        bars = axes.barh(at, lengths, 0.36, color=colour, label=label)
        texts = ["not read" if x is None else f"{x:.4g}" for x in values]
        axes.bar_label(bars, labels=texts, padding=4, fontsize=8)


def _number(value: Any) -> float | None:
    """Convert a number of the document, which has infinite numbers as text."""
    return None if value is None else float(value)


def inline(svg: str, prefix: str, label: str) -> str:
    """Convert an SVG document to an element of an HTML page.

    Args:
        svg: The result of `megatron_ext.report.figures.svg`.
        prefix: Prefix of every id, because two figures on a page have the same ids.
        label: Description of the figure for screen readers.

    Returns:
        The element without namespaces, metadata and comments, which only a file needs.
    """
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(?::\w+)?="[^"]*"', "", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip()
