"""Check an optimizer's first step since it was built or loaded, in any training loop.

The check is part of the optimizer's own step, because every loop calls it. Cost: one Python check
of the param_groups, one pass over the gradients and one over the moments, once per load. It has no
collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..base.log import say
from ..errors import GuardError, HostError
from ..plan.decisions import GroupPlan
from ..policy.policy import ResumePolicy
from ..report.resume_report import ResumeReport
from . import guard
from .steps import decays_decoupled, parameters_of
from .survey import survey


@torch.no_grad()
def checked(member: Any, step: Callable[[], bool]) -> bool:
    """Make the first step of an optimizer, and compare it with the plan.

    Args:
        member: The optimizer, one of this package's.
        step: Makes Megatron's step with gradients that are clipped and unscaled.

    Returns:
        What Megatron's step returns.

    Raises:
        HostError: The policy asks for something that the training loop has not carried out. Nothing
            has been changed; every rank raises.
        GuardError: The hyperparameters are not the planned ones; every rank raises, before the
            step. Or the moments are no result of it, on the ranks that hold such moments.
    """
    resume = member.resume
    report: ResumeReport | None = resume.report
    if report is None:
        _require_no_state(resume.policy)
        return step()
    number = next(i for i, one in enumerate(resume.members) if one is member)
    _require_counters(report)
    _require_scheduler(report)
    if resume.guard and member.optimizer is not None:
        _check_hyperparameters(report, number, member)
    gradient = _gradient_norm(member) if resume.guard else None
    result = step()
    if gradient is not None:
        _check_moments(number, member, gradient)
    member.moments_checked = gradient is not None or not parameters_of(member.optimizer)
    if resume.guard and all(one.stepped for one in resume.members):
        adam = all(one.described.adam for one in resume.members)
        moments = (
            f"and the moment norms can result from {'an Adam update' if adam else 'one update'} of "
            "the loaded moments"
            if all(one.moments_checked for one in resume.members)
            else "and not all moment norms could be checked (L2 weight decay, several betas, "
            "parameters without a gradient, or moments of a normalised gradient)"
        )
        say(
            "megatron_ext: guard: 1 step after the load the hyperparameters match the plan, "
            f"{moments}"
        )
    return result


def _require_no_state(policy: ResumePolicy) -> None:
    """Raise if a policy needs the state of a checkpoint, and none was loaded."""
    if policy.needs_optimizer:
        asked = ", ".join(policy.operations) or "values from the checkpoint"
        raise HostError(
            f"the policy asks for {asked}, but no optimizer state was loaded before the first "
            "step; expected optimizer.load_state_dict with the state of a checkpoint. Let the "
            "training script load the optimizer, or leave the policy out"
        )


def _require_counters(report: ResumeReport) -> None:
    """Raise if a phase resets counters that the training loop has not fetched."""
    phase = report.phase
    if phase is None or phase.state != "applied" or report.counters is not None:
        return
    asked = {
        "the iteration": phase.policy.reset_iteration,
        "the data position": phase.policy.reset_dataloader,
    }
    if reset := " and ".join(name for name, wanted in asked.items() if wanted):
        raise HostError(
            f"the policy resets {reset}, and no training loop has taken the counters before the "
            "first step; only Megatron's own loop takes them by itself. Call counters() of what "
            "megatron_ext.enable returns, after the load and before the data iterators are made, "
            "or take the counters out of the policy"
        )


def _require_scheduler(report: ResumeReport) -> None:
    """Raise if the scheduler's values come from the checkpoint, and none has loaded them."""
    if report.scheduler is None and report.optimizers[0].plan.policy.schedule == "checkpoint":
        raise HostError(
            "the policy takes the schedule from the checkpoint, and no OptimizerParamScheduler "
            "was loaded before the first step. Let the training script load it with "
            "load_state_dict, or take schedule: checkpoint out of the policy"
        )


def _check_hyperparameters(report: ResumeReport, number: int, member: Any) -> None:
    """Compare the hyperparameters of an optimizer's groups with the plan.

    Without a scheduler of Megatron's, lr and weight decay are whatever the training loop has set.
    """
    groups = report.optimizers[number].plan.groups
    first = {}
    if report.scheduler is not None:
        first = {f["group"]: f for f in report.scheduler["first_step"] if f["optimizer"] == number}
    elif number == 0 and groups:
        _say_no_scheduler(groups[0], member.optimizer.param_groups[0])
    planned, used = [], []
    for group, live in zip(groups, member.optimizer.param_groups, strict=True):
        # Only the scheduler knows these two.
        others = set(member.described.hyperparameters) - {"lr", "weight_decay"}
        values = {k: v for k, v in group.values.items() if k in others}
        if (at := first.get(group.index)) is not None:
            values |= {"lr": at["lr"], "weight_decay": at["weight_decay"]}
        planned.append(guard.GroupValues.of(number, group.index, values))
        used.append(guard.GroupValues.of(number, group.index, live))
    if wrong := guard.wrong_hyperparameters(planned, used):
        raise GuardError(wrong)


def _say_no_scheduler(group: GroupPlan, live: dict[str, Any]) -> None:
    saved = next((d.checkpoint for d in group.decisions if d.key == "lr"), None)
    before = "" if saved is None else f" (the checkpoint's last: {float(saved):.6E})"
    say(
        "megatron_ext: WARNING: no OptimizerParamScheduler was loaded with the optimizer: the "
        f"first step's learning rate in param_group 0 is {float(live['lr']):.6E}{before}. If the "
        "schedule is to go on, load the scheduler's state, or set its position, after the "
        "optimizer's"
    )


def _gradient_norm(member: Any) -> float | None:
    """Compute the norm of this rank's part of the gradient; None if the moments are not checked.

    A parameter without a gradient keeps its moments. L2 decay is added to the gradient inside of
    the optimizer: for SGD, which knows no other, its norm is added to the bound.
    """
    inner, state = member.optimizer, member.described
    if member.norms_after_load is None or inner is None or _decays(member) is None:
        return None
    if not decays_decoupled(member) and not state.coupled_decay:
        return None
    params = parameters_of(inner)
    # With --use-precision-aware-optimizer the gradient is not in .grad, whose dtype is the
    # parameter's (core/optimizer/distrib_optimizer.py:2780, 0.19.2).
    found = [g if (g := getattr(p, "decoupled_grad", None)) is not None else p.grad for p in params]
    gradients = [g for g in found if g is not None]
    if len(gradients) < len(params) or not params:
        return None
    norm = _norm(gradients)
    if state.coupled_decay:
        groups = (group for group in inner.param_groups if group["params"])
        norm += sum(abs(group["weight_decay"]) * _norm(group["params"]) for group in groups)
    return norm


def _norm(tensors: Sequence[torch.Tensor]) -> float:
    norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in tensors]
    return float(torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])))


def _decays(member: Any) -> tuple[float, ...] | None:
    """Return the decay of each moment; None if the groups differ, or no moment can be checked."""
    moments = member.described.moments
    found = {
        tuple(moment.decay_in(group) for moment in moments)
        for group in member.optimizer.param_groups
        if group["params"]
    }
    checkable = any(moment.of_gradient for moment in moments)
    return found.pop() if checkable and len(found) == 1 else None


def _check_moments(number: int, member: Any, gradient: float) -> None:
    """Compare the norms of this rank's moments with the bounds of one step."""
    inner, before, decays = member.optimizer, member.norms_after_load, _decays(member)
    assert decays is not None
    after = survey(inner, list(inner.state)).norms
    state = member.described
    if wrong := guard.wrong_moments(number, state, decays, before, after, gradient):
        raise GuardError(wrong)
