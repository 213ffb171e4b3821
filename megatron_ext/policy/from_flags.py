"""Build a `Request` and its `ResumePolicy` from parsed flags."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ..errors import PolicyError
from ..rules import registry
from . import presets, yaml_file
from .flags import flag_of, policy_defaults
from .match import GroupRule, Match, MomentRule
from .parameter_map import Copy, ParameterMap
from .policy import ResumePolicy
from .request import Request

#: Flags of the policy that may be given beside a file.
_BESIDE_A_FILE = (
    "selective_phase",
    "selective_dry_run",
    "selective_guard",
    "selective_verify",
    "reset_iteration",
    "reset_dataloader",
)


def request_from_args(args: argparse.Namespace | Any) -> Request:
    """Build the request from parsed arguments.

    Args:
        args: Megatron's namespace, or one with this package's flags only.

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
        verify=getattr(args, "selective_verify", False),
    )


def _policy(args: argparse.Namespace | Any) -> ResumePolicy:
    defaults = policy_defaults()
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
                f"--selective-policy {file} and {', '.join(map(flag_of, both))}: expected the file "
                "or the flags. Put what the flags say into the file"
            )
        policy = _beside(yaml_file.read(file), values)
    else:
        policy = _from_flags(values)
    if getattr(args, "use_checkpoint_opt_param_scheduler", False):
        policy = dataclasses.replace(policy, schedule="checkpoint")
    return policy


def _beside(policy: ResumePolicy, values: dict[str, Any]) -> ResumePolicy:
    """Add the flags that may be combined with a policy file."""
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
            MomentRule(Match.parse(match), registry.parse(m), registry.parse(v))
            for match, m, v in values["selective_rule"]
        ),
        step=int(step) if isinstance(step, str) and step.isdecimal() else step,
        nonfinite=values["selective_nonfinite"],
        master_weights=values["selective_master_weights"],
        parameters=ParameterMap(
            tuple(values["selective_new_parameters"]),
            tuple(values["selective_drop_parameters"]),
            tuple(_copy(words) for words in values["selective_copy_parameters"]),
        ),
        strict=values["selective_strict"],
        schedule_position=values["selective_schedule"],
        grad_scaler=values["selective_grad_scaler"],
        reset_iteration=values["reset_iteration"],
        reset_dataloader=values["reset_dataloader"],
        phase=values["selective_phase"] or "",
    )


def _copy(words: list[str]) -> Copy:
    if not 2 <= len(words) <= len(("TO", "FROM", "STATE")):
        raise PolicyError(
            f"--selective-copy-parameters {' '.join(words)}: expected TO FROM, or TO FROM and "
            "weights or moments"
        )
    return Copy(*words)  # type: ignore[arg-type]


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
