"""``python -m megatron_ext plan``: print the plan of a resume without a run."""

from __future__ import annotations

import argparse
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from . import output
from .pasted import script_arguments

if TYPE_CHECKING:
    from rich.console import Console

    from ..offline.forecast_model import Forecast, OptimizerForecast
    from ..report.curves import Curve

_OUTCOMES = {
    "transition": "TRANSITION: a phase begins",
    "continued": "CONTINUED: the checkpoint belongs to this phase already",
    "resume": "RESUME: no one-time operation requested",
    "drops": "THE MOMENTS ARE DROPPED",
    "refused": "REFUSED: the run would stop before its first step",
}


def add_to(commands: Any) -> None:
    """Add the command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        usage="python -m megatron_ext plan CKPT [options] [Megatron arguments]",
        help="print the plan of a resume",
        description="Print the plan of a resume from a checkpoint with these arguments. Give the "
        "command line of the run (torchrun and all), or only the arguments that change: the others "
        "are then taken "
        "from the checkpoint and listed. No tensor is read and no code of the checkpoint is run. "
        "Exit status: 0; 1 if there are warnings, also about unknown flags; 2 if the resume would "
        "be refused or the checkpoint cannot be read.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="the directory given to --load")
    _add_options(parser)
    parser.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="[Megatron arguments]",
        help="for example --lr 3e-5 --min-lr 2e-5 --selective-preset reset",
    )
    parser.set_defaults(run=run, print_help=parser.print_help)


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options, which may stand between Megatron's arguments."""
    parser.add_argument("--json", action="store_true", help="print JSON (schemas/resume-plan)")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves into a .png or .svg file")
    parser.add_argument("--iteration", type=int, help="same as --ckpt-step; default: the last")
    parser.add_argument("--policy", metavar="FILE", help="same as --selective-policy")


def run(options: argparse.Namespace) -> int:
    """Print the plan; see the description for the exit status."""
    return output.guarded(lambda: _plan(options))


def _plan(options: argparse.Namespace) -> int:
    if {"-h", "--help"} & set(options.arguments):
        options.print_help()
        return 0
    words = _own_options(options)
    if options.plot is not None:
        from ..report.figures import require_format

        require_format(options.plot)
        output.require_package("matplotlib", "--plot")
    from ..host.contract import require_megatron
    from ..offline.forecast import forecast

    require_megatron()
    with output.logs_to_stderr():
        # Megatron warns about optional packages, which a plan does not need.
        warnings.filterwarnings("ignore", module=r"megatron\.")
        found = forecast(options.checkpoint, words, options.iteration)
    if options.json:
        from ..offline.plan_document import document

        output.print_json(document(found))
    else:
        _print(found)
    if options.plot is not None:
        from ..report.figures import curves_figure, save

        save(curves_figure(found.curves), options.plot)
    return found.status


def _own_options(options: argparse.Namespace) -> list[str]:
    """Parse this command's options after the checkpoint's name; return the other words."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ext plan", add_help=False, allow_abbrev=False
    )
    _add_options(parser)
    # An option that is not given there keeps its value from before the checkpoint's name.
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    given, words = parser.parse_known_args(options.arguments)
    words = script_arguments(words)
    for name, value in vars(given).items():
        setattr(options, name, value)
    if options.policy is not None:
        words += ["--selective-policy", options.policy]
    return words


def _print(found: Forecast) -> None:
    from ..report.log_lines import parameter_lines

    to = output.console()
    output.print_table(to, "plan", ("", ""), _summary(found))
    for number, error in enumerate(found.errors, 1):
        to.print(output.cell(f"refused, {number}: {error}"))
    output.print_table(to, "counters", ("", "checkpoint", "resumed run"), _counters(found))
    for line in parameter_lines(found.mapped):
        to.print(output.cell(line.removeprefix(" > ")))
    for number, one in enumerate(found.optimizers):
        _print_optimizer(to, number, one)
    columns = ("scheduler", "checkpoint", "argument", "value", "taken from")
    rows = [(k, v.checkpoint, v.argument, v.value, v.taken) for k, v in found.scheduler.items()]
    output.print_table(to, "scheduler", columns, rows)
    _print_first_step(to, found)
    _print_curves(to, found.curves)
    for warning in found.all_warnings:
        to.print(output.cell(f"WARNING: {warning}"))
    for source in dict.fromkeys(a.source for a in found.arguments.assumed):
        of_one = [a for a in found.arguments.assumed if a.source == source]
        # A flag that is off is off in Megatron's defaults too.
        values = [f"{a.flag} {a.value}" for a in of_one if a.value is not False]
        to.print(output.cell(f"assumed, from {source}: {' '.join(values)}"))
    for note in found.notes:
        to.print(output.cell(f"note: {note}"))


def _summary(found: Forecast) -> Iterator[tuple[str, Any]]:
    stored, arguments = found.stored, found.arguments
    yield "outcome", _OUTCOMES[found.outcome]
    if found.phase is not None:
        yield "phase", found.phase.why
    elif found.dropped:
        yield "phase", f"{found.dropped}: the optimizer's state is not loaded"
    yield "checkpoint", stored.directory
    yield "format", " ".join(filter(None, (stored.format, stored.sharding_type)))
    rest = "missing arguments have Megatron's defaults"
    if not arguments.complete:
        rest = "missing arguments come from the checkpoint (listed below)"
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
            to.print(output.cell(f"unchanged: {', '.join(same)}"))
        if group.dropped:
            names = ", ".join(group.dropped)
            to.print(output.cell(f"not used, only in the checkpoint: {names}"))
    for index in plan.unused_saved_groups:
        to.print(f"saved param_group {index} corresponds to no current one: not used")
    if plan.clip_grad is not None:
        d = plan.clip_grad
        to.print(output.cell(f"clip_grad: {d.argument} -> {d.value} ({d.reason})"))
    columns = ("rule", "exp_avg", "exp_avg_sq", "parameters", "elements", "for example")
    rules = [(*dataclasses.astuple(r)[:-1], "\n".join(r.examples)) for r in one.rules or ()]
    _print_multiline(to, f"optimizer {number}: moments", columns, rules)
    if one.rules == ():
        to.print(f"optimizer {number}: the moments are kept from the checkpoint")
    for resized in one.resized:
        to.print(output.cell(str(resized)))


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


def _print_first_step(to: Console, found: Forecast) -> None:
    rows = [
        (f"optimizer {curve.optimizer} group {curve.group}", lr, decay)
        for curve, lr, decay in found.first_step
    ]
    columns = ("first resumed step", "lr", "weight decay")
    output.print_table(to, "first resumed step", columns, rows)


def _print_curves(to: Console, curves: Sequence[Curve]) -> None:
    """Print some points of every curve."""
    columns = ("curve", "", "iteration", "samples", "lr", "weight decay")
    rows = [
        (f"{c.label}, optimizer {c.optimizer} group {c.group}", name, *at)
        for c in curves
        for name, at in _points(c)
    ]
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
