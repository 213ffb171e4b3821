"""`ResumePolicy` from Megatron-style flags."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .host import DEFAULT_CLASS, Request
from .policy import ResumePolicy


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this package's flags; to be passed to Megatron as ``extra_args_provider``.

    With it ``--optimizer-class`` works in the script without the launcher: Megatron is prepared
    for it here, and nothing changes unless the flag is given.

    Args:
        parser: Megatron's parser.

    Returns:
        The same parser.
    """
    from . import host

    host.install()
    return add_flags(parser)


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags only; a parser that has them already is returned as it is."""
    if any("--optimizer-class" in action.option_strings for action in parser._actions):
        return parser
    group = parser.add_argument_group(title="selective resume (megatron_ext)")
    group.add_argument(
        "--optimizer-class",
        metavar="PATH",
        default=None,
        help=f"Dotted path of the class built in place of DistributedOptimizer, for example "
        f"{DEFAULT_CLASS}. Without it nothing changes.",
    )
    group.add_argument(
        "--selective-keep-hyperparameters",
        metavar="KEY",
        nargs="+",
        default=[],
        help="param_group keys whose value is taken from the checkpoint instead of the current "
        "arguments, for example: betas eps weight_decay.",
    )
    group.add_argument(
        "--selective-report",
        metavar="DIR",
        default=None,
        help="Directory for the resume report (resume-report.json), written by rank 0.",
    )
    return parser


def request_from_args(args: argparse.Namespace | Any) -> Request:
    """Read the flags from parsed arguments.

    Args:
        args: Megatron's namespace, or one that only has this package's flags.

    Raises:
        PolicyError: The flags contradict themselves.
    """
    from_checkpoint = getattr(args, "use_checkpoint_opt_param_scheduler", False)
    directory = getattr(args, "selective_report", None)
    return Request(
        optimizer_class=args.optimizer_class,
        policy=ResumePolicy(
            keep_hyperparameters=tuple(getattr(args, "selective_keep_hyperparameters", None) or ()),
            schedule="checkpoint" if from_checkpoint else "args",
        ),
        report_dir=Path(directory) if directory else None,
    )
