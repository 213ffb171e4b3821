"""Read Megatron's arguments, and find flags that drop the optimizer or do not go with a resume."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from ..errors import HostError
from ..policy.policy import ResumePolicy
from .contract import TRAINING


def parse_arguments(argv: list[str]) -> Any:
    """Parse a command line as Megatron does, without its validation. Unknown flags are ignored.

    Args:
        argv: The script's name and its arguments.

    Raises:
        SystemExit: argparse refuses the arguments, as it would in the script.
    """
    module = importlib.import_module(f"{TRAINING}.arguments")
    before, sys.argv = sys.argv, argv
    try:
        return module.parse_args(ignore_unknown_args=True)
    finally:
        sys.argv = before


def megatron_parser(prog: str, usage: str) -> argparse.ArgumentParser:
    """Build Megatron's own parser, without the flags that this package adds in a run.

    Args:
        prog: The program's name in messages.
        usage: The usage text. It replaces the default one, which names every flag.
    """
    add = importlib.import_module(f"{TRAINING}.arguments").add_megatron_arguments
    add = getattr(add, "__megatron_ext_original__", add)
    parser: argparse.ArgumentParser = add(
        argparse.ArgumentParser(prog=prog, usage=usage, allow_abbrev=False)
    )
    return parser


def global_args() -> Any:
    """Return Megatron's parsed arguments; None before they are parsed or without its training."""
    variables = sys.modules.get(f"{TRAINING}.global_vars")
    return getattr(variables, "_GLOBAL_ARGS", None)


def dropping_flag(args: Any) -> str | None:
    """Return the flag with which stock drops the optimizer's state; None if none is given.

    Args:
        args: Megatron's arguments.
    """
    for name in ("no_load_optim", "finetune"):
        if getattr(args, name, False):
            return f"--{name.replace('_', '-')}"
    return "--skip-train" if only_evaluates(args) else None


def only_evaluates(args: Any) -> bool:
    """Whether stock builds no optimizer (training/training.py:2031, 0.19.2).

    With an RL step, --skip-train still builds and loads one.

    Args:
        args: Megatron's arguments, or None.
    """
    return bool(getattr(args, "skip_train", False)) and not getattr(args, "perform_rl_step", False)


def is_validated(args: Any) -> bool:
    """Whether Megatron has validated arguments, and filled in some (training/arguments.py:1219).

    Args:
        args: Megatron's arguments.
    """
    return hasattr(args, "consumed_train_samples")


def needs_optimizer(flag: str, policy: ResumePolicy) -> HostError:
    """Make the error for a policy that needs the optimizer state that a flag drops."""
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


def is_layer_wise(args: Any) -> bool:
    """Whether Megatron builds its layer-wise distributed optimizer.

    It does so for Muon and similar optimizers with --use-distributed-optimizer. Its validation
    replaces that by an argument without a flag (training/arguments.py:1670, 0.19.2).

    Args:
        args: Megatron's arguments, before or after its own validation, or an OptimizerConfig.
    """
    optimizer = str(getattr(args, "optimizer", "adam"))
    if getattr(args, "use_layer_wise_distributed_optimizer", False):
        return True
    distributed = optimizer not in ("adam", "sgd") and getattr(
        args, "use_distributed_optimizer", False
    )
    return bool(distributed) or optimizer.startswith("dist_")


#: Why SGD is refused with the distributed optimizer.
SGD_APART = (
    "Megatron builds no DistributedOptimizer over SGD, because it could not be stored "
    "(core/optimizer/distrib_optimizer.py:688, 0.19.2). Leave --use-distributed-optimizer out"
)


def refused_flags(args: Any) -> list[str]:
    """List Megatron's own flags that cannot go with ``--optimizer-class``, with the reasons."""
    optimizer = getattr(args, "optimizer", "adam")
    reasons = {
        "--optimizer sgd and --use-distributed-optimizer": optimizer == "sgd"
        and getattr(args, "use_distributed_optimizer", False)
        and SGD_APART,
        f"--optimizer {optimizer} and --ckpt-format torch": is_layer_wise(args)
        and getattr(args, "ckpt_format", None) == "torch"
        and "Megatron's layer-wise distributed optimizer (--use-distributed-optimizer, or "
        "dist_muon) stores its part in a file of each rank, which is not tested with a selective "
        "resume. Use --ckpt-format torch_dist",
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
