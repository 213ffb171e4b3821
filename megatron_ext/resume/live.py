"""`transform_moments` applies moment rules to a live optimizer, in RL phases or training loops."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..base import ranks
from ..checkpoint.state import SavedOptimizer
from ..errors import HostError, MegatronExtError, PolicyError
from ..host.optimizers import state_of_member
from ..plan.decisions import Circumstances, ResumePlan
from ..plan.hyperparameters import plan_resume
from ..policy.policy import ResumePolicy
from ..policy.presets import KEEP_ALL
from ..report.loaded import LoadedState
from ..report.model import OptimizerReport
from ..report.resume_report import ResumeReport
from . import apply_rules, nonfinite, prepare_rules
from .members import adam_optimizers
from .steps import decays_decoupled, place_step, step_of


def transform_moments(
    optimizer: Any, policy: ResumePolicy, *, model_chunks: Sequence[Any] | None = None
) -> ResumeReport:
    """Apply a policy's moment rules to a live optimizer, between two training steps.

    One fused call per optimizer and device changes the moments in place. Master weights,
    hyperparameters and the scheduler do not change. The call is collective over the default process
    group: every rank calls it with the same policy.

    Args:
        optimizer: The result of `megatron.core.optimizer.get_megatron_optimizer`, from this package
            or stock: DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer, or a
            ChainedOptimizer of these.
        policy: The preset, the rules and the step. A policy that also decides hyperparameters is
            refused.
        model_chunks: The model. It is needed only for a stock optimizer that is not distributed.

    Returns:
        A report like that of a resume. Its warnings name the hyperparameters that the preset would
        change at a load.

    Raises:
        PolicyError: The policy decides more than moments and step.
        PlanError: A rule cannot be applied, and no moment has been changed; or the optimizer
            cannot use what the rules made, and the policy's choice for that is ``error``.
        HostError: The state of an optimizer cannot be reached.
    """
    members: list[Any] = []
    plans: list[ResumePlan] = []
    works: list[prepare_rules.MomentWork | None] = []
    error = None
    try:
        _only_moments(policy)
        members = adam_optimizers(optimizer)
        plans = [_plan(policy, member) for member in members]
        for member, plan in zip(members, plans, strict=True):
            chunks = model_chunks or _chunks(member)
            works.append(prepare_rules.prepare(member, chunks, plan, member.param_groups, members))
    except MegatronExtError as e:
        error = e
    digest = hashlib.sha256("".join(p.digest() for p in plans).encode()).hexdigest()
    ranks.agree("transform_moments", digest, error)
    met = [None if work is None else prepare_rules.exchange_with_ranks(work) for work in works]
    reports = []
    for member, plan, work in zip(members, plans, met, strict=True):
        moments = None if work is None else apply_rules.apply_rules(work)
        notes: tuple[str, ...] = ()
        if work is not None and moments is not None:
            moments, notes = nonfinite.handle_made(work, moments)
            if getattr(member, "norms_after_load", None) is not None:
                # The guard compares the first step's moments with these.
                member.norms_after_load = moments.norms_on_this_rank
        if plan.step != plan.saved_step:
            place_step(member.optimizer, plan.step)
        counts = tuple(len(g["params"]) for g in member.param_groups)
        kind = f"{type(member).__name__} over {type(member.optimizer).__name__}"
        reports.append(OptimizerReport(kind, plan, LoadedState(), counts, moments, notes))
    return ResumeReport("", reports)


def _plan(policy: ResumePolicy, member: Any) -> ResumePlan:
    groups = [{k: v for k, v in g.items() if k != "params"} for g in member.param_groups]
    saved = SavedOptimizer(tuple(groups), step_of(member.optimizer))
    circumstances = Circumstances(
        clip_grad=member.config.clip_grad,
        decoupled_weight_decay=decays_decoupled(member),
        live=True,
        optimizer=state_of_member(member),
    )
    return plan_resume(policy, saved, groups, circumstances)


def _only_moments(policy: ResumePolicy) -> None:
    moments_only = ResumePolicy(
        preset=policy.preset, rules=policy.rules, step=policy.step, strict=policy.strict
    )
    if replace(policy, nonfinite="error") != moments_only:
        raise PolicyError(
            "transform_moments changes moments and step only; expected a policy with preset, rules "
            "and step, found one that also decides hyperparameters. Set those in the param_groups"
        )
    if policy == ResumePolicy(preset=KEEP_ALL):
        raise PolicyError("transform_moments: the policy keeps everything; expected a rule")


def _chunks(member: Any) -> Sequence[Any]:
    chunks = getattr(member, "model_chunks", ()) or getattr(member, "resume_chunks", ())
    if not chunks:
        raise HostError(
            f"transform_moments: {type(member).__name__} does not know its model; pass "
            "model_chunks, the list the optimizer was built with"
        )
    return list(chunks)
