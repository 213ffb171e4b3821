"""The resume report as one HTML page that needs nothing else: no script, no other file. Pure.

It is made from the report's JSON document alone, so that it can be made on another machine. The
document's texts are names of parameters, files and phases: none is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from .printable import printable
from .report_plots import Plots

Document = Mapping[str, Any]

_TEMPLATE = "templates/resume-report.html"

_STATES = {
    "applied": "Transition applied",
    "continued": "Continued",
    "none": "Resumed",
}
_COUNTERS = {
    "iteration": "iteration",
    "consumed_train_samples": "consumed samples (data position)",
    "skipped_train_samples": "skipped samples",
    "consumed_valid_samples": "consumed validation samples",
    "num_steps": "schedule position, in samples",
}
_STATE_TENSORS = {"param": "master weights", "state": "state (not Adam's)"}
_ENVIRONMENT = {"python": "Python", "torch": "torch", "ranks": "ranks", "time": "resumed at"}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        cells: Any values.
        changed: Whether it stands out.
    """

    cells: tuple[Any, ...]
    changed: bool = False


@dataclass(frozen=True)
class Table:
    """A table; one without rows is not shown.

    Args:
        columns: Their names.
        rows: As many cells each.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def page(document: Document, plots: Plots | None = None) -> str:
    """The report as HTML.

    Args:
        document: Of `ResumeReport.to_json`, or read from ``resume-report.json``.
        plots: Of `megatron_ext.report_plots.draw`; their SVG elements are taken as they are.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: The document is no report.
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
        counters=_counters(document),
        first_step=_first_step(document),
        scheduler=_scheduler(document),
        optimizers=[_optimizer(o) for o in document["optimizers"]],
        phase=_phase(document),
        policy=json.dumps(document["policy"], indent=2, ensure_ascii=False).split("\n"),
        environment=_environment(document),
        plots={name: Markup(svg) for name, svg in drawn.items()},
        absent=plots.absent,
    )


def text_of(value: Any) -> str:
    """A value of the document as a reader wants it: six digits, brackets around several."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(text_of, value))})"
    return str(value)


def _title(document: Document) -> str:
    phase = document["phase"] or {"state": "none", "name": None}
    name = f": phase {phase['name']}" if phase["name"] else ""
    return f"{_STATES[phase['state']]}{name}"


def _summary(document: Document) -> list[str]:
    """What happened, in three lines: from where, at what, and whether to look closer."""
    return [_from_where(document), _goes_on(document), _to_look_at(document)]


def _from_where(document: Document) -> str:
    phase = document["phase"] or {}
    source = phase.get("checkpoint")
    loaded = f"Loaded {source}" if source else "Loaded a checkpoint"
    operations = ", ".join(phase.get("operations", ())) or "no change of state"
    if phase.get("state") == "applied":
        return f"{loaded}. A phase begins here with: {operations}."
    if phase.get("state") == "continued":
        return f"{loaded}. The phase that started from {phase['from']} goes on; nothing is redone."
    return f"{loaded}. Hyperparameters were decided; the state goes on as it was."


def _goes_on(document: Document) -> str:
    counters, scheduler = document["counters"], document["scheduler"]
    where = "The run goes on"
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


def _counters(document: Document) -> Table:
    rows = [
        Row((name, c["checkpoint"], c["value"]), c["checkpoint"] != c["value"])
        for key, name in _COUNTERS.items()
        if (c := (document["counters"] or {}).get(key)) is not None
    ]
    return Table(("counter", "checkpoint", "goes on at"), tuple(rows))


def _first_step(document: Document) -> Table:
    rows = [
        Row(
            (
                f"optimizer {first['optimizer']}, param_group {first['group']}",
                first["lr"],
                first["weight_decay"],
            )
        )
        for first in (document["scheduler"] or {}).get("first_step", ())
    ]
    return Table(("", "learning rate", "weight decay"), tuple(rows))


def _scheduler(document: Document) -> Table:
    scheduler = document["scheduler"] or {"values": {}}
    values = [
        Row(
            (name, v["checkpoint"], v["argument"], v["value"], v["taken"]),
            v["checkpoint"] is not None and v["checkpoint"] != v["value"],
        )
        for name, v in scheduler["values"].items()
    ]
    batch = scheduler.get("global_batch_size")
    if batch is not None:
        pair = batch["checkpoint"], batch["value"]
        changed = None not in pair and pair[0] != pair[1]
        values.append(Row(("global batch size", pair[0], pair[1], pair[1], "arguments"), changed))
        last = scheduler["train_iters"]
        values.append(Row(("last iteration", None, last, last, "arguments")))
    return Table(("value", "checkpoint", "argument", "used", "from"), tuple(values))


def _optimizer(optimizer: Document) -> dict[str, Any]:
    moments = optimizer["moments"]
    return {
        "kind": optimizer["kind"],
        "digest": optimizer["plan_digest"],
        "loaded": _loaded(optimizer),
        "scalars": _scalars(optimizer),
        "rules": None if moments is None else _rules(moments),
        "moments": None if moments is None else _moments(moments),
        "unread": _unread(moments),
        "resized": _resized(optimizer),
        "groups": [_group(g) for g in optimizer["groups"]],
        "unused": optimizer["unused_saved_groups"],
    }


def _loaded(optimizer: Document) -> Table:
    loaded = optimizer["loaded"]
    rows = [
        Row((_STATE_TENSORS.get(key, key), shards, _count(loaded["elements"][key])))
        for key, shards in loaded["tensors"].items()
    ]
    return Table(("from the checkpoint", "shards, all ranks", "elements, all ranks"), tuple(rows))


def _scalars(optimizer: Document) -> Table:
    step, scale, clip = (optimizer[key] for key in ("step", "loss_scale", "clip_grad"))
    rows = [_pair("step", step["checkpoint"], step["value"], f"from the {step['taken']}")]
    if scale is not None:
        rows.append(_pair("loss scale", scale["checkpoint"], scale["value"], "grad scaler"))
    if clip is not None:
        rows.append(_pair("clip_grad", clip["argument"], clip["value"], clip["reason"]))
    return Table(("state", "before", "goes on with", "why"), tuple(rows))


def _pair(name: str, before: Any, after: Any, why: str) -> Row:
    return Row((name, before, after, why), before != after)


def _rules(moments: Document) -> Table:
    rows = [
        Row(
            (
                rule["rule"],
                rule["exp_avg"],
                rule["exp_avg_sq"],
                _count(rule["elements"]),
                ", ".join(rule.get("examples", ())) or "all that no rule names",
            ),
            not rule["exp_avg"] == rule["exp_avg_sq"] == "keep" and rule["elements"] > 0,
        )
        for rule in moments["rules"]
    ]
    columns = ("rule", "exp_avg", "exp_avg_sq", "elements, all ranks", "parameters (some)")
    return Table(columns, tuple(rows))


def _moments(moments: Document) -> Table:
    rows = [
        Row(
            (
                key,
                "not read" if state["rms_before"] is None else state["rms_before"],
                state["rms_after"],
                *(_count(state[name]) for name in ("changed", "nonfinite", "unread")),
            ),
            state["changed"] > 0 or state["unread"] > 0,
        )
        for key, state in moments["state"].items()
    ]
    columns = ("moment", "RMS before", "RMS after", "changed", "not finite", "not read")
    return Table(columns, tuple(rows))


def _unread(moments: Document | None) -> list[str]:
    states = {} if moments is None else moments["state"]
    return [
        f"{key}: {_count(state['unread'])} elements, since they are overwritten"
        for key, state in states.items()
        if state["unread"]
    ]


def _resized(optimizer: Document) -> Table:
    keys = ("parameter", "checkpoint_rows", "rows", "new_rows", "dropped_rows")
    rows = [Row(tuple(one[key] for key in keys), True) for one in optimizer["resized"]]
    columns = ("parameter", "rows in the checkpoint", "rows now", "new rows", "dropped rows")
    return Table(columns, tuple(rows))


def _group(group: Document) -> dict[str, Any]:
    told: list[Row] = []
    folded: list[Row] = []
    for key, d in group["keys"].items():
        # The scheduler decides lr, which is in the table of the first step.
        used = "set by the scheduler" if key == "lr" else d["value"]
        plain = (key, d["checkpoint"], d["argument"], used, d["taken"], d["reason"])
        stands_out = key != "lr" and (d["changed"] or d["reason"] != "default")
        (told if stands_out else folded).append(Row(plain, stands_out and d["changed"]))
    saved = group["saved_index"]
    where = "none" if saved is None else str(saved)
    columns = ("key", "checkpoint", "argument", "used", "from", "why")
    return {
        "index": group["index"],
        "about": f"saved group {where}: {group['note']}; {group['parameters_on_rank_0']} "
        "parameters on rank 0",
        "told": Table(columns, tuple(told)),
        "folded": Table(columns, tuple(folded)),
        "dropped": ", ".join(group["dropped_keys"]),
    }


def _phase(document: Document) -> Table:
    phase = document["phase"] or {}
    named = {
        "loaded checkpoint": phase.get("checkpoint"),
        "phase": phase.get("name"),
        "started from": phase.get("from"),
        "operations": ", ".join(phase.get("operations", ())),
        "digest of the operations": phase.get("digest"),
        "why": phase.get("why"),
    }
    return _named(named.items())


def _environment(document: Document) -> Table:
    environment = document.get("environment") or {}
    return _named(
        [
            ("megatron_ext", document["megatron_ext"]),
            ("megatron-core", document["megatron_core"]),
            *((name, environment.get(key)) for key, name in _ENVIRONMENT.items()),
            ("format", document["schema"]),
        ]
    )


def _named(pairs: Iterable[tuple[str, Any]]) -> Table:
    return Table(("", ""), tuple(Row(pair) for pair in pairs if pair[1] not in (None, "")))


def _count(number: int) -> str:
    return f"{number:,}"
