"""The library's entry functions: enable resumes in a host, add the flags, build an optimizer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .checkpoint.state import DirectoryRole
from .errors import HostError
from .hooks import enabled, installing, session
from .hooks.directories import choose_directories
from .host import classes
from .policy import yaml_file
from .policy.flags import add_flags
from .policy.policy import ResumePolicy
from .policy.request import DEFAULT_CLASS, Request
from .resume import members


def enable(
    policy: ResumePolicy | str | Path | None = None,
    *,
    report_dir: str | Path | None = None,
    optimizer_class: str = DEFAULT_CLASS,
    role: DirectoryRole = "load",
    guard: bool = True,
    verify: bool = False,
) -> enabled.Enabled:
    """Enable selective resumes in a host with its own training script.

    Call it on every rank before the host builds its optimizer with Megatron, and before or after
    the host has imported Megatron's functions by name. The next optimizers of this process are
    built with the class, and their loads follow the policy.

    Args:
        policy: The policy, or a YAML file that has it; the default keeps no hyperparameter.
        report_dir: Where rank 0 writes the resume report, or None.
        optimizer_class: Dotted path of the `DistributedOptimizer` subclass to build.
        role: The role of the directory that the host loads from. ``load``: the mark in the
            checkpoint tells whether the phase begins or continues. ``start``: the phase begins.
            ``own``: the phase continues.
        guard: Whether the first resumed step is checked against the plan.
        verify: Whether a load compares the CRC32 of everything that it reads.

    Returns:
        An object that a training loop of the host's asks for its counters. Only Megatron's own loop
        takes them by itself: with a policy that resets them, the first step raises an error if
        nobody has asked.

    Raises:
        HostError: An optimizer was built already; an earlier call or the command line asks for
            something else; the class cannot be used; or Megatron cannot.
        PolicyError: The file cannot be read, or is not a policy.
    """
    if isinstance(policy, str | Path):
        policy = yaml_file.read(policy, "policy")
    directory = Path(report_dir) if report_dir else None
    return enabled.enable(
        Request(
            optimizer_class,
            policy or ResumePolicy(),
            directory,
            where=role,
            guard=guard,
            verify=verify,
        )
    )


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this package's flags; to be passed to Megatron as ``extra_args_provider``.

    With it ``--optimizer-class`` works in the script without the launcher: Megatron is prepared
    for it here, and nothing changes unless the flag is given.

    Args:
        parser: Megatron's parser.

    Returns:
        The same parser.
    """
    installing.install()
    return choose_directories(add_flags(parser))


def get_megatron_optimizer(
    config: Any,
    model_chunks: list[Any],
    *args: Any,
    policy: ResumePolicy | None = None,
    optimizer_class: str = DEFAULT_CLASS,
    report_dir: str | Path | None = None,
    verify: bool = False,
    **kwargs: Any,
) -> Any:
    """Drop-in for `megatron.core.optimizer.get_megatron_optimizer`.

    Args:
        config: `megatron.core.optimizer.OptimizerConfig`.
        model_chunks: Model chunks wrapped in Megatron's DistributedDataParallel.
        *args: As Megatron's function.
        policy: What to take from where at a load; the default keeps no hyperparameter.
        optimizer_class: Dotted path of the `DistributedOptimizer` subclass to build.
        report_dir: Where rank 0 writes the resume report, or None.
        verify: Whether a load compares the CRC32 of everything that it reads.
        **kwargs: As Megatron's function.

    Returns:
        A `MegatronOptimizer`, usually a `ChainedOptimizer`, as Megatron's function.

    Raises:
        HostError: The class cannot be used, the configuration is not supported, or the installed
            Megatron has moved what this package leans on.
    """
    from megatron.core.optimizer import get_megatron_optimizer as stock

    installing.install()
    directory = Path(report_dir) if report_dir else None
    request = Request(optimizer_class, policy or ResumePolicy(), directory, verify=verify)
    classes.resolve_class(optimizer_class)
    with session.requested(request):
        optimizer = stock(config, model_chunks, *args, **kwargs)
    if classes.resolve_class(optimizer_class) is classes.resolve_class(DEFAULT_CLASS) and not (
        members.members_of(optimizer)
    ):
        raise HostError(f"optimizer_class {optimizer_class}: no optimizer was built with it")
    return optimizer
