"""``python -m megatron_ext plan``: print the plan of a resume without a run."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import MegatronExtError
from . import output

if TYPE_CHECKING:
    from ..offline.forecast_model import Forecast

#: Options that decide what is printed on stdout.
_FORMS = ("json", "full", "emit_command", "emit_policy")


def add_to(commands: Any) -> None:
    """Add the command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        usage="python -m megatron_ext plan CKPT [options] [Megatron arguments]",
        help="print the plan of a resume",
        description="Print the plan of a resume from a checkpoint with these arguments. Give the "
        "command line of the run (torchrun and all), or only the arguments that change: the others "
        "are then taken from the checkpoint, and --full lists them. No tensor is read and no code "
        "of the checkpoint is run. Exit status: 0; 1 if there are warnings, also about unknown "
        "flags; 2 if the resume would be refused or the checkpoint cannot be read.",
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
    parser.add_argument(
        "--full",
        action="store_true",
        help="print every key, rule, curve, note and assumed argument too",
    )
    parser.add_argument(
        "--emit-command",
        action="store_true",
        help="print only the torchrun line of the run. Arguments that are not given are the "
        "checkpoint's; it needs Megatron's training part",
    )
    parser.add_argument(
        "--emit-policy",
        action="store_true",
        help="print only the YAML file for --selective-policy that says the same as the flags",
    )
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
    forms = [f"--{name.replace('_', '-')}" for name in _FORMS if getattr(options, name)]
    if len(forms) > 1:
        raise MegatronExtError(f"{' and '.join(forms)}: expected one of them. Leave the others out")
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
    elif options.emit_command or options.emit_policy:
        _emit(found, words, policy=options.emit_policy)
    else:
        from .plan_summary import print_summary

        iteration = [] if options.iteration is None else ["--iteration", str(options.iteration)]
        command = ["plan", *iteration, options.checkpoint, *words]
        print_summary(to := output.console(), found, command, full=options.full)
        if options.full:
            from .plan_tables import print_tables

            print_tables(to, found)
    if options.plot is not None:
        from ..report.figures import curves_figure, save

        save(curves_figure(found.curves), options.plot)
    return found.status


def _own_options(options: argparse.Namespace) -> list[str]:
    """Parse this command's options after the checkpoint's name; return the other words."""
    from ..offline.pasted import script_arguments

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


def _emit(found: Forecast, words: Sequence[str], *, policy: bool) -> None:
    """Print the command or the policy on stdout, and everything else on stderr."""
    for kind, texts in (
        ("error", map(str, found.errors)),
        ("warning", found.all_warnings),
        ("note", found.notes),
    ):
        for text in texts:
            print(output.printable(f"{kind}: {text}"), file=sys.stderr)
    if found.errors:
        return
    from ..offline.emitted import command_of, policy_of

    text, notes = (policy_of(found), []) if policy else command_of(found, words)
    for note in notes:
        print(output.printable(f"note: {note}"), file=sys.stderr)
    print(text)
