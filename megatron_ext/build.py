"""Build Megatron's optimizer from a script of one's own: `get_megatron_optimizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import host
from .errors import HostError
from .policy import ResumePolicy


def get_megatron_optimizer(
    config: Any,
    model_chunks: list[Any],
    *args: Any,
    policy: ResumePolicy | None = None,
    optimizer_class: str = host.DEFAULT_CLASS,
    report_dir: str | Path | None = None,
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
        **kwargs: As Megatron's function.

    Returns:
        What Megatron returns: a `MegatronOptimizer`, usually a `ChainedOptimizer`.

    Raises:
        HostError: The class cannot be used, the configuration is not supported, or the installed
            Megatron has moved what this package leans on.
    """
    from megatron.core.optimizer import get_megatron_optimizer as stock

    host.install()
    request = host.Request(
        optimizer_class, policy or ResumePolicy(), Path(report_dir) if report_dir else None
    )
    host.resolve_class(optimizer_class)
    with host.requested(request):
        optimizer = stock(config, model_chunks, *args, **kwargs)
    if host.resolve_class(optimizer_class) is host.resolve_class(host.DEFAULT_CLASS) and not (
        host.members_of(optimizer)
    ):
        raise HostError(f"optimizer_class {optimizer_class}: no optimizer was built with it")
    return optimizer
