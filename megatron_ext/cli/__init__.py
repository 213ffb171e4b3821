"""The command line: one module per command. No command needs a GPU or ranks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..version import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The command and its options; ``sys.argv[1:]`` by default.

    Returns:
        The exit status.
    """
    options = command_line().parse_args(argv)
    status: int = options.run(options)
    return status


def command_line() -> argparse.ArgumentParser:
    """Build the parser of all commands; the parsed options hold the function ``run``."""
    from . import convert, diff, edit, env, inspect, plan, report, verify

    parser = argparse.ArgumentParser(prog="python -m megatron_ext", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    env.add_to(commands)
    convert.add_to(commands)
    inspect.add_to(commands)
    verify.add_to(commands)
    diff.add_to(commands)
    edit.add_to(commands)
    plan.add_to(commands)
    report.add_to(commands)
    return parser
