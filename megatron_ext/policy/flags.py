"""The command-line flags of this package."""

from __future__ import annotations

import argparse
import difflib
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from .. import rules
from . import presets
from .request import DEFAULT_CLASS

GROUP = "selective resume (megatron_ext)"
#: Flags that do not belong to the policy.
_OTHER_FLAGS = ("optimizer_class", "selective_report", "selective_policy", "selective_from")


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags to a parser; one that has them already is returned unchanged."""
    if any("--optimizer-class" in action.option_strings for action in parser._actions):
        return parser
    group = parser.add_argument_group(title=GROUP)
    group.add_argument(
        "--optimizer-class",
        metavar="PATH",
        default=None,
        help=f"Dotted path of the class built in place of DistributedOptimizer, for example "
        f"{DEFAULT_CLASS}. Without it nothing changes.",
    )
    group.add_argument(
        "--selective-policy",
        metavar="FILE",
        default=None,
        help="YAML file with the whole policy. It can be combined only with --selective-report, "
        "--selective-from, --selective-phase, --selective-dry-run, --selective-verify, "
        "--no-selective-guard, --reset-iteration and --reset-dataloader.",
    )
    group.add_argument(
        "--selective-keep-hyperparameters",
        metavar="KEY",
        nargs="+",
        action="extend",
        default=[],
        help="param_group keys whose value is taken from the checkpoint instead of the current "
        "arguments, for example: betas eps weight_decay.",
    )
    group.add_argument(
        "--selective-hyperparameters",
        choices=("args", "checkpoint"),
        default="args",
        help="Source of the keys that no flag names. Default: args.",
    )
    group.add_argument(
        "--selective-take-hyperparameters",
        "--selective-override",
        metavar="KEY",
        nargs="+",
        action="extend",
        default=[],
        help="With --selective-hyperparameters checkpoint: keys taken from the arguments.",
    )
    group.add_argument(
        "--selective-group-rule",
        metavar="WORD",
        nargs="+",
        action="append",
        default=[],
        help="Exception for some param_groups: KEY=VALUE ... keep KEY ... take KEY ..., or one of "
        "the two, for example: is_expert_parallel=true keep max_lr min_lr. Can be repeated.",
    )
    group.add_argument(
        "--selective-preset",
        metavar="WORD",
        nargs="+",
        default=["keep"],
        help=f"Change of the moments that no rule names: {', '.join(presets.forms())}.",
    )
    group.add_argument(
        "--selective-decline",
        "--selective-preset-exclude",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="Parts of the preset that are left out, for example: lr eps.",
    )
    group.add_argument(
        "--selective-rule",
        metavar=("MATCH", "EXP_AVG", "EXP_AVG_SQ"),
        nargs=3,
        action="append",
        default=[],
        help="Change of the moments of some parameters, for example: "
        "'output_layer.weight[32000:]' reset 'fill column-mean'. MATCH is a glob, or re: and a "
        "regular expression, then [rows], ndim=N and KEY=VALUE of the param_group. Operations: "
        f"{', '.join(rules.GRAMMAR)}. Can be repeated.",
    )
    group.add_argument(
        "--selective-step",
        metavar="STEP",
        default=None,
        help="Adam's step: keep, reset, or a number. Default: what the preset says.",
    )
    group.add_argument(
        "--selective-nonfinite",
        choices=("error", "reset", "keep"),
        default="error",
        help="What to do about moments that Adam cannot use, in the checkpoint or after the rules: "
        "NaN, infinite, or negative in exp_avg_sq. Default: error.",
    )
    group.add_argument(
        "--selective-master-weights",
        choices=("checkpoint", "model"),
        default="checkpoint",
        help="Source of the fp32 master weights. model: they are made from the weights that the "
        "model has loaded, which were edited or averaged after the save. Default: checkpoint.",
    )
    for flag, what in (
        (
            "--selective-new-parameters",
            "Parameters of the model whose state the checkpoint lacks, for example: "
            "'mtp.*' output_layer.weight. Their weights stay as initialised unless the checkpoint "
            "has them, and their moments start at 0 unless a rule fills them.",
        ),
        (
            "--selective-drop-parameters",
            "Parameters of the checkpoint that the model does not have, whose state is left "
            "behind.",
        ),
    ):
        group.add_argument(
            flag, metavar="PATTERN", nargs="+", action="extend", default=[], help=what
        )
    group.add_argument(
        "--selective-copy-parameters",
        metavar="WORD",
        nargs="+",
        action="append",
        default=[],
        help="TO FROM: parameters TO take weights and moments from the checkpoint's FROM, for "
        "example: 'decoder.layers.{n}.*' 'decoder.layers.{n-12}.*'. A third word, weights or "
        "moments, copies only these. Can be repeated.",
    )
    group.add_argument(
        "--no-selective-strict",
        dest="selective_strict",
        action="store_false",
        default=True,
        help="Warn about a rule that matches nothing, instead of stopping.",
    )
    group.add_argument(
        "--selective-from",
        metavar="DIR",
        default=None,
        help="Directory from which a phase starts, with its optimizer state. It is loaded as long "
        "as --load and --save, the phase's own directory, hold no checkpoint. The same command "
        "line then restarts the phase. --ckpt-step is an iteration of DIR.",
    )
    group.add_argument(
        "--selective-phase",
        metavar="NAME",
        default=None,
        help="Name of the phase; it distinguishes phases with the same policy.",
    )
    group.add_argument(
        "--selective-schedule",
        choices=("continue", "restart"),
        default=None,
        help="The scheduler's position: go on, or start again at 0 (a re-warm-up with kept "
        "moments). Default: restart with --reset-iteration, else continue.",
    )
    group.add_argument(
        "--selective-reset-schedule",
        dest="selective_schedule",
        action="store_const",
        const="restart",
        help="The same as --selective-schedule restart.",
    )
    group.add_argument(
        "--selective-grad-scaler",
        choices=("keep", "reset"),
        default="keep",
        help="Loss scale of fp16: keep the checkpoint's (default), or reset it to the initial one "
        "of the arguments.",
    )
    for flag, what in (
        ("--reset-iteration", "Count the iterations from 0 again"),
        ("--reset-dataloader", "Read the data from its beginning again"),
    ):
        # Megatron forks have flags of these names.
        if flag not in parser._option_string_actions:
            group.add_argument(
                flag,
                action="store_true",
                help=f"{what}. This happens once: a restart from the phase's own checkpoint "
                "continues the count.",
            )
    group.add_argument(
        "--selective-report",
        metavar="DIR",
        default=None,
        help="Directory for the resume report, which rank 0 writes: resume-report.json and .txt. "
        "`python -m megatron_ext report DIR` makes an HTML page from them.",
    )
    group.add_argument(
        "--selective-dry-run",
        action="store_true",
        help="Build and load everything, log the plan and the changes, and exit with status 0 "
        "before the first step, without saving a checkpoint.",
    )
    group.add_argument(
        "--selective-verify",
        action="store_true",
        help="Compare the CRC32 that torch.save has stored with everything that a rank reads. "
        "Without it that is done for objects only, such as param_groups, and a flipped bit in a "
        "tensor is loaded as it is, as in stock.",
    )
    group.add_argument(
        "--no-selective-guard",
        action="store_false",
        dest="selective_guard",
        help="Do not check the first resumed step against the plan. By default the run stops if "
        "hyperparameters differ from the plan or moment norms cannot be the result of Adam "
        "updates.",
    )
    return parser


def given_without_class(args: argparse.Namespace | Any) -> list[str]:
    """List this package's flags that were given without ``--optimizer-class``."""
    if getattr(args, "optimizer_class", None) is not None:
        return []
    others = ("selective_from", "selective_policy", "selective_report")
    defaults = {**policy_defaults(), **dict.fromkeys(others)}
    return [flag_of(k) for k, v in defaults.items() if getattr(args, k, v) not in (v, None)]


def without_class(flags: Sequence[str]) -> str:
    """Write the message for flags of this package that would have no effect."""
    return (
        f"{', '.join(flags)} without --optimizer-class: it would have no effect. Add "
        f"--optimizer-class {DEFAULT_CLASS}"
    )


@functools.cache
def policy_defaults() -> dict[str, Any]:
    """Return the destinations of the flags that make a policy, with their defaults."""
    parser = add_flags(argparse.ArgumentParser(add_help=False))
    defaults = vars(parser.parse_args([]))
    return {k: v for k, v in defaults.items() if k not in _OTHER_FLAGS}


def values_of(args: Any) -> dict[str, Any]:
    """Everything in parsed arguments that a `Request` is made from."""
    others = (*_OTHER_FLAGS, "selective_where", "use_checkpoint_opt_param_scheduler")
    return {name: getattr(args, name, None) for name in (*policy_defaults(), *others)}


def flag_of(name: str) -> str:
    """Return the flag of an argparse destination."""
    negative = "no-" if name in ("selective_strict", "selective_guard") else ""
    return f"--{negative}{name.replace('_', '-')}"


def suggestions(words: Iterable[str], known: Iterable[str]) -> str:
    """Write which known flags are meant by unknown ones; empty if none is near.

    Args:
        words: The unknown flags.
        known: All that there are.
    """
    pairs = [(word, difflib.get_close_matches(word, list(known), 1, 0.8)) for word in words]
    return "".join(f" Did you mean {near[0]} in place of {word}?" for word, near in pairs if near)
