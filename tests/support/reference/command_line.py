"""Flags and commands, from the argparse parsers that read them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from unittest.mock import patch

from megatron_ext import cli
from megatron_ext.policy.flags import add_flags
from megatron_ext.policy.launch_line import launcher_parser

from .markdown import blocks, code, preformatted, table, words

#: Defaults that need no words.
_NOTHING = (None, False, True, [], argparse.SUPPRESS)


def flags() -> str:
    """Every flag that is added to Megatron's parser."""
    return _options("flag", _flags())


def launcher() -> str:
    """Usage of the launcher, and its options that are no flags of the script."""
    parser = launcher_parser()
    shared = {option for action in _flags() for option in action.option_strings}
    own = [a for a in parser._actions if not shared & set(a.option_strings)]
    usage = f"usage: {parser.prog} [--cpu] [--cpu-adam ...] SCRIPT.py [Megatron arguments]"
    return blocks(preformatted(usage), _options("option", own))


def commands() -> str:
    """Every command of ``python -m megatron_ext``, in a section of its own."""
    # The width that argparse breaks a usage line at.
    with patch.dict(os.environ, COLUMNS="90"):
        actions = cli.command_line()._actions
        (subparsers,) = (a for a in actions if isinstance(a, argparse._SubParsersAction))
        return blocks(
            *(
                blocks(
                    f"## {name}",
                    words(parser.description or ""),
                    preformatted(parser.format_usage().strip()),
                    _options("argument", parser._actions),
                )
                for name, parser in subparsers.choices.items()
            )
        )


def _flags() -> list[argparse.Action]:
    return add_flags(argparse.ArgumentParser(add_help=False))._actions


def _options(what: str, actions: Iterable[argparse.Action]) -> str:
    rows = [
        (code(_written(action)), words(_help(action)))
        for action in actions
        if not isinstance(action, argparse._HelpAction)
    ]
    return table((what, "meaning"), rows) if rows else ""


def _written(action: argparse.Action) -> str:
    """Names and values, as argparse writes them."""
    if not action.option_strings:
        chosen = "" if action.choices is None else " {" + ",".join(map(str, action.choices)) + "}"
        return action.dest + chosen
    names = ", ".join(action.option_strings)
    if action.nargs == 0:
        return names
    values = argparse.HelpFormatter("")._format_args(action, action.dest.upper())
    return f"{names} {values}"


def _help(action: argparse.Action) -> str:
    text = argparse.HelpFormatter("")._expand_help(action)
    if action.default in _NOTHING or "efault" in text:
        return text
    default = action.default
    return f"{text} Default: {' '.join(default) if isinstance(default, list) else default}."
