"""Resume reports made from real plans."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron_ext.checkpoint.state import SavedOptimizer
from megatron_ext.plan.hyperparameters import plan_resume
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.report.loaded import LoadedState
from megatron_ext.report.model import OptimizerReport
from megatron_ext.report.resume_report import ResumeReport

from .groups import group

KEEP_EPS = ResumePolicy(("eps",))
KEEP_WEIGHT_DECAY = ResumePolicy(("weight_decay",))
LOADED = LoadedState(
    tensors={"param": 4, "exp_avg": 4, "exp_avg_sq": 4},
    elements={"param": 640, "exp_avg": 640, "exp_avg_sq": 640},
    proven=640,
)

SAVED = (group(eps=1e-8, amsgrad=False), group(wd_mult=0.0, eps=1e-9), group(lr_mult=0.1))
CURRENT = (
    group(max_lr=1e-3, eps=1e-6, lr=0.0, foreach=None),
    group(max_lr=1e-3, eps=1e-6, lr=0.0, is_expert_parallel=True),
)


def optimizer_report(
    policy: ResumePolicy = KEEP_EPS,
    step: int | None = 100,
    current: tuple[dict[str, Any], ...] = CURRENT,
) -> OptimizerReport:
    """One group that goes on, one that was added, two that are gone."""
    plan = plan_resume(policy, SavedOptimizer(SAVED, step), current)
    return OptimizerReport(
        "SelectiveAdam over FusedAdam", plan, LOADED, tuple(range(3, 3 + len(current)))
    )


def scheduler_section(policy: ResumePolicy = KEEP_WEIGHT_DECAY) -> dict[str, Any]:
    """The section as `megatron_ext.host` makes it from a scheduler."""
    from megatron_ext.hooks import scheduling

    values = {
        "max_lr": 1e-3,
        "min_lr": 1e-4,
        "lr_warmup_steps": 24,
        "lr_decay_steps": 480,
        "lr_decay_style": "cosine",
        "start_wd": 0.1,
        "end_wd": 0.1,
        "wd_incr_steps": 480,
        "wd_incr_style": "constant",
    }
    scheduler = SimpleNamespace(num_steps=32, init_lr=0.0, **values)
    groups = [{"lr": 9.5e-4, "weight_decay": 0.1}, {"lr": 9.5e-5, "weight_decay": 0.0}]
    member = SimpleNamespace(
        resume=SimpleNamespace(policy=policy), optimizer=SimpleNamespace(param_groups=groups)
    )
    saved = {**values, "max_lr": 3e-3, "num_steps": 32}
    arguments = {**scheduling._scheduler_values(scheduler), "start_wd": 0.2}
    length = {"train_iters": 60, "global_batch_size": {"checkpoint": 8, "value": 8}}
    return scheduling.scheduler_section(scheduler, saved, arguments, [member], length)


def resume_report() -> ResumeReport:
    return ResumeReport("0.19.2", [optimizer_report(), optimizer_report(step=None)])
