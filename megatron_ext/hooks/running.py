"""Wrap the training loop for the guard, the writers and the end of a dry run.

Cost: one Python check of the param_groups before the first step and one pass over the moments at
the first logging step. After that the wrappers only forward.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..base.log import say
from ..errors import GuardError
from ..host.arguments import global_args
from ..resume import guard
from ..resume.moments import survey
from ..resume.session import current
from ..resume.steps import is_adam, is_hybrid
from . import writers
from .session import active_request


def train(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``train`` (training/training.py:3342, 0.19.2). A dry run ends here, on every rank."""

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        request = active_request()
        if request is not None and request.dry_run:
            say(
                "megatron_ext: --selective-dry-run: model and optimizer are built and loaded; "
                "no training step is run"
            )
            if dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()
            sys.exit(0)
        resume, current.watch = current.resumed, None
        if resume is not None and resume.complete:
            writers.write_to_writers(resume, int(global_args().iteration))
            if request is not None and request.guard:
                current.watch = guard.Watch()
        return original(*args, **kwargs)

    return run


def train_step(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``train_step`` (training/training.py:2336, 0.19.2)."""

    @functools.wraps(original)
    def step(*args: Any, **kwargs: Any) -> Any:
        if (watch := current.watch) is None:
            return original(*args, **kwargs)
        if not watch.started:
            watch.started = True
            _check_hyperparameters()
        result = original(*args, **kwargs)
        # The result is (loss_dict, skipped_iter, should_checkpoint, should_exit, exit_code,
        # grad_norm, ...).
        if not result[1]:
            watch.gradients.append(result[5])
        return result

    return step


def training_log(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``training_log`` (training/training.py:2568, 0.19.2), called after every step."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def log(*args: Any, **kwargs: Any) -> Any:
        if (watch := current.watch) is not None and watch.gradients:
            call = signature.bind(*args, **kwargs).arguments
            first = call.get("is_first_iteration", False)
            if first or call["iteration"] % global_args().log_interval == 0:
                current.watch = None
                _check_moments(watch)
        return original(*args, **kwargs)

    return log


def _check_hyperparameters() -> None:
    """Compare the hyperparameters of the groups with the plan.

    Raises:
        GuardError: They differ; on every rank, because all ranks have the same groups.
    """
    resume = current.resumed
    if resume is None or resume.report is None or resume.report.scheduler is None:
        return
    first = {(f["optimizer"], f["group"]): f for f in resume.report.scheduler["first_step"]}
    planned, used = [], []
    for number, (member, report) in enumerate(
        zip(resume.members, resume.report.optimizers, strict=True)
    ):
        for group, live in zip(report.plan.groups, member.optimizer.param_groups, strict=True):
            at = first[number, group.index]
            values = {**group.values, "lr": at["lr"], "weight_decay": at["weight_decay"]}
            planned.append(guard.GroupValues.of(number, group.index, values))
            used.append(guard.GroupValues.of(number, group.index, live))
    wrong = guard.wrong_hyperparameters(planned, used)
    if wrong:
        raise GuardError(wrong)


def _check_moments(watch: guard.Watch) -> None:
    """Compare the norms of this rank's moments with the bounds that Adam's updates allow.

    Raises:
        GuardError: A norm is out of its bounds; on the ranks that hold such moments.
    """
    resume = current.resumed
    members = [] if resume is None else resume.members
    for number, member in enumerate(members):
        before, inner = member.norms_after_load, member.optimizer
        clip = member.config.clip_grad
        decoupled = getattr(member.config, "decoupled_weight_decay", True)
        # Without clipping Megatron does not compute the gradient norm, and the norm does not
        # include L2 decay, which Adam adds to the gradient.
        if before is None or not clip or clip <= 0 or not decoupled:
            continue
        if inner is None or not is_adam(inner) or is_hybrid(inner):
            continue
        betas = {tuple(g["betas"]) for g in inner.param_groups if g["params"]}
        if len(betas) != 1 or any(norm is None for norm in watch.gradients):
            continue
        clipped = [min(float(norm), float(clip)) for norm in watch.gradients]
        after = survey(inner, list(inner.state)).norms
        wrong = guard.wrong_moments(number, betas.pop(), before, after, clipped)
        if wrong:
            raise GuardError(wrong)
    say(
        f"megatron_ext: guard: {guard.steps_after(len(watch.gradients))} the load the "
        "hyperparameters match the plan, and the moment norms can result from Adam updates on the "
        "loaded moments"
    )
