"""The library's entry functions: add the flags, and build an optimizer with a policy."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .errors import HostError
from .hooks import installing, session
from .hooks.directories import choose_directories
from .host import classes
from .policy.flags import add_flags
from .policy.policy import ResumePolicy
from .policy.request import DEFAULT_CLASS, Request
from .resume import members


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
