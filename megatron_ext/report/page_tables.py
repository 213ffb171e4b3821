"""Make the tables of the report's page from the JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Document = Mapping[str, Any]
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
        cells: The values, of any type.
        changed: Whether the row is highlighted.
    """

    cells: tuple[Any, ...]
    changed: bool = False


@dataclass(frozen=True)
class Table:
    """A table. The page does not show a table without rows.

    Args:
        columns: The names of the columns.
        rows: The rows, with one cell for each column.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def text_of(value: Any) -> str:
    """Format a value of the document with six digits, and a list in brackets."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(text_of, value))})"
    return str(value)


def counters_table(document: Document) -> Table:
    """Make the table of the counters in the checkpoint and after the load."""
    rows = [
        Row((name, c["checkpoint"], c["value"]), c["checkpoint"] != c["value"])
        for key, name in _COUNTERS.items()
        if (c := (document["counters"] or {}).get(key)) is not None
    ]
    return Table(("counter", "checkpoint", "continues at"), tuple(rows))


def first_step_table(document: Document) -> Table:
    """Make the table of the first resumed step's learning rate and weight decay."""
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


def scheduler_table(document: Document) -> Table:
    """Make the table of the scheduler's values and their sources."""
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


def optimizer_section(optimizer: Document) -> dict[str, Any]:
    """Make all tables of one optimizer."""
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
    if rows:
        rows.append(Row(("master weights proven to be the model's", "", _count(loaded["proven"]))))
    return Table(("state", "shards, all ranks", "elements, all ranks"), tuple(rows))


def _scalars(optimizer: Document) -> Table:
    step, scale, clip = (optimizer[key] for key in ("step", "loss_scale", "clip_grad"))
    rows = [_pair("step", step["checkpoint"], step["value"], f"from the {step['taken']}")]
    if scale is not None:
        rows.append(_pair("loss scale", scale["checkpoint"], scale["value"], "grad scaler"))
    if clip is not None:
        rows.append(_pair("clip_grad", clip["argument"], clip["value"], clip["reason"]))
    return Table(("state", "before", "continues with", "why"), tuple(rows))


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
    shown: list[Row] = []
    folded: list[Row] = []
    for key, d in group["keys"].items():
        # The scheduler sets lr, which is in the table of the first step.
        used = "set by the scheduler" if key == "lr" else d["value"]
        plain = (key, d["checkpoint"], d["argument"], used, d["taken"], d["reason"])
        stands_out = key != "lr" and (d["changed"] or d["reason"] != "default")
        (shown if stands_out else folded).append(Row(plain, stands_out and d["changed"]))
    saved = group["saved_index"]
    where = "none" if saved is None else str(saved)
    columns = ("key", "checkpoint", "argument", "used", "from", "why")
    return {
        "index": group["index"],
        "about": f"saved group {where}: {group['note']}; {group['parameters_on_rank_0']} "
        "parameters on rank 0",
        "told": Table(columns, tuple(shown)),
        "folded": Table(columns, tuple(folded)),
        "dropped": ", ".join(group["dropped_keys"]),
    }


def phase_table(document: Document) -> Table:
    """Make the table of the phase and of its operations."""
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


def environment_table(document: Document) -> Table:
    """Make the table of versions, ranks and time."""
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
