"""Check what a schedule from the checkpoint needs from the arguments. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..host.schedule import saved_values
from .preflight_phase import ResumeContext


def schedule_problems(context: ResumeContext) -> Iterator[str]:
    """Yield the values of a saved schedule that no scheduler state has and that do not fit.

    Stock finds a missing length in the first step of the loaded scheduler, as a TypeError, and
    takes another one without a word (core/optimizer_param_scheduler.py:262, 0.19.2). The saved
    arguments tell what the checkpoint's run had.

    Args:
        context: The resume.
    """
    state = context.stored.scheduler
    taken = saved_values(context.policy)
    if state is None or "lr_decay_style" not in taken:
        return
    if state.get("lr_decay_style") == "WSD":
        yield from _decay_length(context)
        yield from _differing(context, "lr_wsd_decay_style", "the form of WSD's final decay")
    position = 0 if context.policy.restarts_schedule else state.get("num_steps") or 0
    if position < (state.get("lr_warmup_steps") or 0):
        yield from _differing(
            context, "lr_warmup_init", "the learning rate at which the warm-up starts"
        )


def _asked(context: ResumeContext) -> str:
    """Name what takes the schedule from the checkpoint: Megatron's flag, or a policy file."""
    by_flag = getattr(context.args, "use_checkpoint_opt_param_scheduler", False)
    return "--use-checkpoint-opt_param-scheduler" if by_flag else "schedule: checkpoint"


def _decay_length(context: ResumeContext) -> Iterator[str]:
    """Compare the length of the final decay, in samples as the scheduler counts it."""
    args, saved, asked = context.args, context.stored.args, _asked(context)
    now = _length(vars(args))
    before = _length(saved)
    flag = f"--lr-wsd-decay-{_unit(vars(args))}"
    expected = "that of the checkpoint's run"
    if before is not None:
        value, size = before
        unit = f"{value} {_unit(saved)}"
        expected = f"{expected}, {unit}" + (f" of {size} samples" if size not in (None, 1) else "")
    if now is None:
        yield (
            f"{asked}: the checkpoint's schedule is WSD, and no checkpoint's scheduler "
            f"has the length of its final decay. Give {flag}; expected {expected}. Or leave "
            f"{asked} out and give the whole schedule"
        )
    elif before is not None and _differ(now, before):
        yield (
            f"{asked} with {flag} {now[0]}: no checkpoint's scheduler has the length of "
            f"WSD's final decay, so it comes from the argument; expected {expected}. With another "
            f"length the learning rate would jump. Correct it, or leave {asked} out and "
            "give the whole schedule"
        )


def _unit(args: Any) -> str:
    return "iters" if args.get("train_iters") or not args.get("train_samples") else "samples"


def _length(args: Any) -> tuple[int, int | None] | None:
    """Return the length and the samples of its unit, which may be unknown; None without one."""
    unit = _unit(args)
    value = args.get(f"lr_wsd_decay_{unit}")
    return (
        None if value is None else (value, args.get("global_batch_size") if unit == "iters" else 1)
    )


def _differ(now: tuple[int, int | None], before: tuple[int, int | None]) -> bool:
    if now[1] and before[1]:
        return now[0] * now[1] != before[0] * before[1]
    return now[0] != before[0]


def _differing(context: ResumeContext, name: str, what: str) -> Iterator[str]:
    now, before = getattr(context.args, name, None), context.stored.args.get(name)
    if now is None or before is None or now == before:
        return
    flag = f"--{name.replace('_', '-')}"
    asked = _asked(context)
    yield (
        f"{asked} with {flag} {now}: no checkpoint's scheduler has {what}, so "
        f"it comes from the argument; expected {flag} {before}, as in the checkpoint's run. Give "
        f"it, or leave {asked} out and give the whole schedule"
    )
