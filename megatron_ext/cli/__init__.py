"""The command line: one module per command. No command needs a GPU or ranks."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

from ..version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command and its options; ``sys.argv[1:]`` by default.

    Returns:
        The exit status.
    """
    words = sys.argv[1:] if argv is None else argv
    options = command_line().parse_args(words or ["--help"])
    status: int = options.run(options)
    return status


def command_line() -> argparse.ArgumentParser:
    """Build the parser of all commands; the parsed options hold the function ``run``."""
    from . import convert, diff, edit, env, inspect, plan, report, verify

    parser = argparse.ArgumentParser(
        prog="python -m megatron_ext",
        usage="%(prog)s COMMAND ...",
        description="COMMAND --help prints the options of a command.",
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=14, width=110),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        dest="command", required=True, title="commands", metavar="COMMAND", prog=parser.prog
    )
    env.add_to(commands)
    convert.add_to(commands)
    inspect.add_to(commands)
    verify.add_to(commands)
    diff.add_to(commands)
    edit.add_to(commands)
    plan.add_to(commands)
    report.add_to(commands)
    return parser
