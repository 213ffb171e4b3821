"""The launcher's command line: its options, this package's flags, the script and its arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ..errors import PolicyError
from . import flags

PROG = "python -m megatron_ext.launch"


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print below a usage of forty lines."""

    def error(self, message: str) -> NoReturn:
        """Raise the error, with the flag that is meant."""
        hint = ""
        if message.startswith("unrecognized arguments"):
            unknown = [word for word in message.split() if word.startswith("--")]
            hint = flags.suggestions(unknown, self._option_string_actions) or (
                " Megatron's arguments stand after the script's name."
            )
        raise PolicyError(f"{message}.{hint} All options: {PROG} --help")


def launcher_parser() -> argparse.ArgumentParser:
    """Build the launcher's parser. Its errors are `PolicyError`."""
    parser = _Parser(
        prog=PROG,
        description="Run an unmodified Megatron training script with --optimizer-class.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="Run on the CPU over gloo where there is no GPU (demos, tests, dry runs).",
    )
    parser.add_argument(
        "--cpu-adam",
        choices=("fused", "torch"),
        default="fused",
        help="With --cpu: the inner optimizer, a stand-in for TE's and apex's FusedAdam "
        "(default) or torch's AdamW, Megatron's own fallback.",
    )
    flags.add_flags(parser)
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def own_flags_before(words: Sequence[str], options: argparse.Namespace) -> list[str]:
    """Return this package's flags that stand before the script: they go to its arguments.

    Args:
        words: The launcher's command line.
        options: The same, parsed.
    """
    return without_launchers(words[: len(words) - len(options.arguments) - 1])


def without_launchers(words: Sequence[str]) -> list[str]:
    """Drop the launcher's own options from the words before the script's name."""
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--cpu", action="store_true")
    launcher.add_argument("--cpu-adam")
    return launcher.parse_known_args(words)[1]


def peek(words: list[str]) -> argparse.Namespace:
    """Parse this package's flags, and the one that makes Megatron drop them, among all others.

    Args:
        words: The script's arguments.

    Raises:
        PolicyError: A flag is malformed, or two different classes are given.
    """
    parser = _Parser(prog=PROG, add_help=False, allow_abbrev=False)
    flags.add_flags(parser)
    parser.add_argument("--yaml-cfg", default=None)
    parser.add_argument(
        "--use-checkpoint-opt_param-scheduler",
        "--use-checkpoint-opt-param-scheduler",
        dest="use_checkpoint_opt_param_scheduler",
        action="store_true",
    )
    classes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    classes.add_argument("--optimizer-class", action="append", default=[])
    given = list(dict.fromkeys(classes.parse_known_args(words)[0].optimizer_class))
    if len(given) > 1:
        raise PolicyError(
            f"--optimizer-class is given {len(given)} times, with different classes: "
            f"{', '.join(given)}. Give the one that is meant"
        )
    return parser.parse_known_args(words)[0]
