"""Megatron's parser and parsed arguments, and its flags that drop or exclude the optimizer."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from ..errors import HostError
from ..policy.policy import ResumePolicy
from .contract import TRAINING


def parse_arguments(argv: list[str]) -> Any:
    """Megatron's own parsing of a command line, before its validation; flags it lacks are ignored.

    Args:
        argv: The script's name and its arguments.

    Raises:
        SystemExit: argparse refuses them, as it would in the script.
    """
    module = importlib.import_module(f"{TRAINING}.arguments")
    before, sys.argv = sys.argv, argv
    try:
        return module.parse_args(ignore_unknown_args=True)
    finally:
        sys.argv = before


def megatron_parser(prog: str, usage: str) -> argparse.ArgumentParser:
    """Megatron's own parser, without what this package adds to it in a run.

    Args:
        prog: For its messages.
        usage: In place of its own, which names every flag.
    """
    add = importlib.import_module(f"{TRAINING}.arguments").add_megatron_arguments
    add = getattr(add, "__megatron_ext_original__", add)
    parser: argparse.ArgumentParser = add(
        argparse.ArgumentParser(prog=prog, usage=usage, allow_abbrev=False)
    )
    return parser


def global_args() -> Any:
    """Megatron's parsed arguments, or None (also where megatron.training is not used)."""
    variables = sys.modules.get(f"{TRAINING}.global_vars")
    return getattr(variables, "_GLOBAL_ARGS", None)


def dropping_flag(args: Any) -> str | None:
    """The flag with which stock drops the optimizer's state, if one is given.

    Args:
        args: Megatron's.
    """
    for name in ("no_load_optim", "finetune", "skip_train"):
        # With an RL step --skip-train builds and loads an optimizer all the same.
        rl = name == "skip_train" and getattr(args, "perform_rl_step", False)
        if getattr(args, name, False) and not rl:
            return f"--{name.replace('_', '-')}"
    return None


def needs_optimizer(flag: str, policy: ResumePolicy) -> HostError:
    """The error for a policy without the optimizer it needs."""
    goes_on = policy.schedule_position == "continue"
    operations = [*policy.operations, *(["schedule continue"] if goes_on else [])]
    asked = ", ".join(operations) or "hyperparameters from the checkpoint"
    instead = (
        "--reset-iteration and --reset-dataloader do what it does to the counters, and keep the "
        "optimizer"
        if flag == "--finetune"
        else "the scheduler is loaded with it"
        if goes_on
        else "there would be no moments to do this to"
    )
    return HostError(
        f"{flag} with {asked}: this needs the checkpoint's optimizer, which {flag} drops; "
        f"{instead}. Leave one of the two out"
    )


def refused_flags(args: Any) -> list[str]:
    """What of Megatron's own flags cannot go with ``--optimizer-class``, with the reason."""
    optimizer = getattr(args, "optimizer", "adam")
    reasons = {
        f"--optimizer {optimizer}": optimizer in ("sgd", "lion")
        and "only Adam is supported (its state is exp_avg and exp_avg_sq), and chains with it",
        "--use-megatron-fsdp": getattr(args, "use_megatron_fsdp", False)
        and "Megatron-FSDP does not load through DistributedOptimizer",
        "--use-torch-fsdp2": getattr(args, "use_torch_fsdp2", False)
        and "torch FSDP2 does not load through the optimizer's load_state_dict",
        "--non-persistent-ckpt-type local": getattr(args, "non_persistent_ckpt_type", None)
        == "local"
        and "a local checkpoint takes precedence over --load and is not tested with a selective "
        "resume. Use --non-persistent-ckpt-type global, or none for the first resume",
    }
    return [
        f"--optimizer-class {args.optimizer_class} with {flag}: {reason}"
        for flag, reason in reasons.items()
        if reason
    ]
