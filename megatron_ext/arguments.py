"""`ResumePolicy` from Megatron-style flags."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import directories, policy_file, presets, rules
from .errors import MegatronExtError, PolicyError
from .host import DEFAULT_CLASS, Request
from .policy import GroupRule, Match, MomentRule, ResumePolicy

_GROUP = "selective resume (megatron_ext)"
#: Flags that are no part of the policy.
_OTHER_FLAGS = ("optimizer_class", "selective_report", "selective_policy", "selective_from")
#: Flags of the policy that may be given beside a file.
_BESIDE_A_FILE = ("selective_phase", "reset_iteration", "reset_dataloader")


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
    return choose_directories(add_flags(parser))


def choose_directories(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let ``--selective-from`` decide what ``--load`` is, as soon as the arguments are parsed.

    Args:
        parser: Changed: its ``parse_known_args`` (which ``parse_args`` calls too) then gives a
            namespace whose ``load`` is the directory to load from, and ``selective_where``.
    """
    parse = parser.parse_known_args
    if hasattr(parse, "chooses_directories"):
        return parser  # the launcher has been here, and then a script with `add_arguments`
    # A fork's own flags of the same name are not ours to refuse.
    groups = (g for g in parser._action_groups if g.title == _GROUP)
    own = {_flag(action.dest) for group in groups for action in group._group_actions}

    def parse_known_args(*args: Any, **kwargs: Any) -> Any:
        namespace, rest = parse(*args, **kwargs)
        if unheard := own & set(given_without_class(namespace)):
            parser.exit(2, f"{parser.prog}: error: {without_class(sorted(unheard))}\n")
        given = {
            name: getattr(namespace, name, None)
            for name in ("load", "save", "selective_from", "non_persistent_global_ckpt_dir")
        }
        if given["selective_from"] is not None:
            try:
                chosen = directories.choose(*given.values())
            except MegatronExtError:
                return namespace, rest  # the preflight says so, beside whatever else is wrong
            namespace.load, namespace.selective_where = str(chosen.load), chosen.where
            if chosen.where == "own":
                # It has said where the phase starts; a restart goes on from the newest.
                namespace.selective_start_step = getattr(namespace, "ckpt_step", None)
                namespace.ckpt_step = None
        return namespace, rest

    parse_known_args.chooses_directories = True  # type: ignore[attr-defined]
    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]
    return parser


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags only; a parser that has them already is returned as it is."""
    if any("--optimizer-class" in action.option_strings for action in parser._actions):
        return parser
    group = parser.add_argument_group(title=_GROUP)
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
        help="YAML file with the whole policy; of the other flags only --selective-report, "
        "--selective-from, --selective-phase, --reset-iteration and --reset-dataloader go with it.",
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
        "--selective-hyperparameters",
        choices=("args", "checkpoint"),
        default="args",
        help="Where the keys come from that are not named. Default: args.",
    )
    group.add_argument(
        "--selective-take-hyperparameters",
        metavar="KEY",
        nargs="+",
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
        "the two, for example: "
        "is_expert_parallel=true keep max_lr min_lr. May be given again.",
    )
    group.add_argument(
        "--selective-preset",
        metavar="WORD",
        nargs="+",
        default=["keep"],
        help=f"What is done to the moments that no rule names: {', '.join(presets.forms())}.",
    )
    group.add_argument(
        "--selective-decline",
        metavar="NAME",
        nargs="+",
        default=[],
        help="Parts of the preset that are left out, for example: lr eps.",
    )
    group.add_argument(
        "--selective-rule",
        metavar=("MATCH", "EXP_AVG", "EXP_AVG_SQ"),
        nargs=3,
        action="append",
        default=[],
        help="What is done to the moments of some parameters, for example: "
        "'output_layer.weight[32000:]' reset 'fill column-mean'. MATCH is a glob, or re: and a "
        "regular expression, then [rows], ndim=N and KEY=VALUE of the param_group. Operations: "
        f"{', '.join(rules.GRAMMAR)}. May be given again.",
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
        help="What to do about NaN and infinite moments in the checkpoint. Default: error.",
    )
    group.add_argument(
        "--no-selective-strict",
        dest="selective_strict",
        action="store_false",
        default=True,
        help="Warn where a rule matches nothing, instead of stopping.",
    )
    group.add_argument(
        "--selective-from",
        metavar="DIR",
        default=None,
        help="Where a phase starts, with its optimizer state: loaded as long as --load and --save, "
        "the phase's own directory, hold no checkpoint. The same command line then restarts it. "
        "--ckpt-step is an iteration of DIR.",
    )
    group.add_argument(
        "--selective-phase",
        metavar="NAME",
        default=None,
        help="Name of the phase, to tell it from another one with the same policy.",
    )
    group.add_argument(
        "--selective-schedule",
        choices=("continue", "restart"),
        default=None,
        help="The scheduler's position: go on, or start again at 0 (a re-warm-up with kept "
        "moments). Default: restart with --reset-iteration, else continue.",
    )
    group.add_argument(
        "--selective-grad-scaler",
        choices=("keep", "reset"),
        default="keep",
        help="fp16's loss scale: of the checkpoint (default), or the arguments' initial one.",
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
                help=f"{what}, once: a restart from the phase's own checkpoint goes on.",
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
        help="Build and load everything, log the plan and what was done, and exit with 0 before "
        "the first step; no checkpoint is saved. With --selective-report also "
        "parameter-layout.json: which parameter lies where in the buckets of a dp_reshardable "
        "checkpoint, for `megatron_ext inspect --moments --layout`.",
    )
    group.add_argument(
        "--no-selective-guard",
        action="store_false",
        dest="selective_guard",
        help="Do not check the first resumed steps against the plan. By default hyperparameters "
        "that differ from it, or moments that Adam cannot have made, stop the run.",
    )
    return parser


def request_from_args(args: argparse.Namespace | Any) -> Request:
    """Read the flags from parsed arguments.

    Args:
        args: Megatron's namespace, or one that only has this package's flags.

    Raises:
        PolicyError: The flags contradict themselves.
    """
    directory = getattr(args, "selective_report", None)
    return Request(
        optimizer_class=args.optimizer_class,
        policy=_policy(args),
        report_dir=Path(directory) if directory else None,
        where=getattr(args, "selective_where", "load"),
        guard=getattr(args, "selective_guard", True),
        dry_run=getattr(args, "selective_dry_run", False),
    )


def given_without_class(args: argparse.Namespace | Any) -> list[str]:
    """This package's flags that were given although ``--optimizer-class`` was not."""
    if getattr(args, "optimizer_class", None) is not None:
        return []
    others = ("selective_from", "selective_policy", "selective_report")
    defaults = {**_policy_flags(), **dict.fromkeys(others)}
    return [_flag(k) for k, v in defaults.items() if getattr(args, k, v) not in (v, None)]


def without_class(flags: Sequence[str]) -> str:
    """The message for flags of this package that nothing would come of."""
    return (
        f"{', '.join(flags)} without --optimizer-class: nothing would come of it. Add "
        f"--optimizer-class {DEFAULT_CLASS}"
    )


def _policy(args: argparse.Namespace | Any) -> ResumePolicy:
    defaults = _policy_flags()
    values = {name: getattr(args, name, None) for name in defaults}
    values = {name: defaults[name] if v is None else v for name, v in values.items()}
    file = getattr(args, "selective_policy", None)
    if file is not None:
        both = [
            name
            for name, value in values.items()
            if value != defaults[name] and name not in _BESIDE_A_FILE
        ]
        if both:
            raise PolicyError(
                f"--selective-policy {file} and {', '.join(map(_flag, both))}: expected the file "
                "or the flags. Put what the flags say into the file"
            )
        policy = _beside(policy_file.read(file), values)
    else:
        policy = _from_flags(values)
    if getattr(args, "use_checkpoint_opt_param_scheduler", False):
        policy = dataclasses.replace(policy, schedule="checkpoint")
    return policy


def _beside(policy: ResumePolicy, values: dict[str, Any]) -> ResumePolicy:
    """A file's policy with the flags that may stand beside it."""
    name = values["selective_phase"]
    if name is not None and policy.phase not in ("", name):
        raise PolicyError(
            f"--selective-phase {name}: the policy file names the phase {policy.phase!r}; expected "
            "one name"
        )
    return dataclasses.replace(
        policy,
        phase=name or policy.phase,
        reset_iteration=policy.reset_iteration or values["reset_iteration"],
        reset_dataloader=policy.reset_dataloader or values["reset_dataloader"],
    )


def _from_flags(values: dict[str, Any]) -> ResumePolicy:
    name, *numbers = values["selective_preset"]
    step = values["selective_step"]
    return ResumePolicy(
        keep_hyperparameters=tuple(values["selective_keep_hyperparameters"]),
        take_hyperparameters=tuple(values["selective_take_hyperparameters"]),
        hyperparameters=values["selective_hyperparameters"],
        groups=tuple(_group_rule(words) for words in values["selective_group_rule"]),
        preset=presets.Preset(name, tuple(numbers), tuple(values["selective_decline"])),
        rules=tuple(
            MomentRule(Match.parse(match), rules.parse(m), rules.parse(v))
            for match, m, v in values["selective_rule"]
        ),
        step=int(step) if isinstance(step, str) and step.isdecimal() else step,
        nonfinite=values["selective_nonfinite"],
        strict=values["selective_strict"],
        schedule_position=values["selective_schedule"],
        grad_scaler=values["selective_grad_scaler"],
        reset_iteration=values["reset_iteration"],
        reset_dataloader=values["reset_dataloader"],
        phase=values["selective_phase"] or "",
    )


def _group_rule(words: list[str]) -> GroupRule:
    match = [w for w in words if "=" in w]
    rest = words[len(match) :]
    if words[: len(match)] != match or not rest or rest[0] not in ("keep", "take"):
        raise PolicyError(
            f"--selective-group-rule {' '.join(words)}: expected KEY=VALUE ... keep KEY ... take "
            "KEY ..., or one of the two"
        )
    keys: dict[str, list[str]] = {"keep": [], "take": []}
    for word in rest:
        if word in keys:
            named = keys[word]
        else:
            named.append(word)
    pairs = tuple((k, v) for k, _, v in (w.partition("=") for w in match))
    return GroupRule(pairs, tuple(keys["keep"]), tuple(keys["take"]))


@functools.cache
def _policy_flags() -> dict[str, Any]:
    """The flags that make a policy, and their defaults."""
    parser = add_flags(argparse.ArgumentParser(add_help=False))
    defaults = vars(parser.parse_args([]))
    return {k: v for k, v in defaults.items() if k not in _OTHER_FLAGS}


def _flag(name: str) -> str:
    return "--no-selective-strict" if name == "selective_strict" else f"--{name.replace('_', '-')}"
