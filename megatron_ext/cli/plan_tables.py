"""The tables of ``plan --full``: every key, rule and curve."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..report.log_lines import parameter_lines
from . import output

if TYPE_CHECKING:
    from rich.console import Console

    from ..offline.forecast_model import Forecast, OptimizerForecast
    from ..report.curves import Curve


def print_tables(to: Console, found: Forecast) -> None:
    """Print all that `megatron_ext.cli.plan_summary` leaves out.

    Args:
        to: The console.
        found: The forecast.
    """
    from ..offline.emitted import flag_words

    to.print()
    output.print_table(to, "plan", ("", ""), _summary(found))
    output.print_table(to, "counters", ("", "checkpoint", "resumed run"), _counters(found))
    for line in parameter_lines(found.mapped):
        output.print_text(to, line.removeprefix(" > "))
    for number, one in enumerate(found.optimizers):
        _print_optimizer(to, number, one)
    columns = ("scheduler", "checkpoint", "argument", "value", "taken from")
    rows = [(k, v.checkpoint, v.argument, v.value, v.taken) for k, v in found.scheduler.items()]
    output.print_table(to, "scheduler", columns, rows)
    _print_curves(to, found.curves)
    for source in dict.fromkeys(a.source for a in found.arguments.assumed):
        of_one = [a for a in found.arguments.assumed if a.source == source]
        flags = shlex.join(word for a in of_one for word in flag_words(a.flag, a.value))
        output.print_text(to, f"assumed, from {source}: {flags}")


def _summary(found: Forecast) -> Iterator[tuple[str, Any]]:
    arguments = found.arguments
    if found.phase is not None:
        yield "phase", found.phase.why
    elif found.dropped:
        yield "phase", f"{found.dropped}: the optimizer's state is not loaded"
    rest = "missing arguments have Megatron's defaults"
    if not arguments.complete:
        rest = "missing arguments come from the checkpoint (listed at the end)"
    yield "command line", f"parsed by {arguments.parsed_by}; {rest}"


def _counters(found: Forecast) -> Iterator[tuple[str, Any, Any]]:
    if found.counters is not None:
        before, after = map(dataclasses.asdict, found.counters)
        for name, value in before.items():
            if value or after[name]:
                yield name, value, after[name]


def _print_optimizer(to: Console, number: int, one: OptimizerForecast) -> None:
    plan = one.plan
    step = f"step {plan.step}"
    if plan.step != plan.saved_step:
        step += f" (checkpoint {plan.saved_step})"
    for group in plan.groups:
        where = "none" if group.saved_index is None else group.saved_index
        title = f"optimizer {number}, {step}: param_group {group.index}"
        columns = ("key", "checkpoint", "argument", "value", "taken from", "why")
        decisions = [d for d in group.decisions if d.key != "lr"]  # the scheduler's, see below
        notable = [d for d in decisions if d.changed or d.reason != "default"]
        rows: list[Sequence[Any]] = [
            (d.key, d.checkpoint, d.argument, d.value, d.taken, d.reason) for d in notable
        ]
        rows.append(("saved group", where, "", "", "", group.note))
        output.print_table(to, title, columns, rows)
        same = [f"{d.key} {d.value}" for d in decisions if d not in notable]
        if same:
            output.print_text(to, f"unchanged: {', '.join(same)}")
        if group.dropped:
            names = ", ".join(group.dropped)
            output.print_text(to, f"not used, only in the checkpoint: {names}")
    columns = ("rule", "exp_avg", "exp_avg_sq", "parameters", "elements", "for example")
    rules = [(*dataclasses.astuple(r)[:-1], "\n".join(r.examples)) for r in one.rules or ()]
    _print_multiline(to, f"optimizer {number}: moments", columns, rules)
    if one.rules == ():
        output.print_text(to, f"optimizer {number}: the moments are kept from the checkpoint")
    for resized in one.resized:
        output.print_text(to, str(resized))


def _print_multiline(
    to: Console, title: str, columns: Iterable[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Print a table whose last column has one line per name."""
    lines = [
        row
        for *first, names in rows
        for n, name in enumerate(names.split("\n"))
        for row in [(*first, name) if n == 0 else (*[""] * len(first), name)]
    ]
    output.print_table(to, title, columns, lines)


def _print_curves(to: Console, curves: Sequence[Curve]) -> None:
    """Print some points of every curve."""
    columns = ("curve", "opt", "group", "", "iteration", "samples", "lr", "decay")
    rows = [(c.label, c.optimizer, c.group, name, *at) for c in curves for name, at in _points(c)]
    output.print_table(to, "learning rate and weight decay", columns, rows)


def _points(curve: Curve) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the first, highest, middle and last point, each once."""
    last = len(curve.lr) - 1
    middle = (curve.iterations[0] + curve.iterations[-1]) / 2
    nearest = min(range(last + 1), key=lambda i: abs(curve.iterations[i] - middle))
    highest = max(range(last + 1), key=lambda i: curve.lr[i])
    chosen: dict[int, str] = {}
    for index, name in ((0, "first"), (highest, "highest"), (nearest, "middle"), (last, "last")):
        chosen.setdefault(index, name)
    for index in sorted(chosen):
        at = curve.iterations[index], curve.samples[index], curve.lr[index]
        yield chosen[index], (*at, curve.weight_decay[index])
