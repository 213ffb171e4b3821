"""Check the schedule before a model is built: that of the arguments, and that of a checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import PlanError
from ..host.arguments import is_validated, only_evaluates
from ..host.schedule import ScheduleValues, refusal, resumed, saved_values, values_of
from .preflight_phase import ResumeContext


def argument_problems(args: Any) -> Iterator[str]:
    """Yield what Megatron asserts of the arguments when it constructs its scheduler.

    It does so after it has built the model and before it loads the checkpoint, whatever is then
    taken from there. Most of its assertions have no message (training/arguments.py:1320 and :1353,
    core/optimizer_param_scheduler.py:131, 0.19.2).

    Args:
        args: Megatron's arguments, before or after its own validation.
    """
    found = [*_rate_problems(args), *_weight_decay_problems(args)]
    if not only_evaluates(args):
        found += _schedule_problems(args)
        if not found and (values := _values(args)) is not None and (said := refusal(values)):
            found.append(
                f"Megatron's scheduler does not accept the arguments: {said} (it gets {values}). "
                "Correct the learning rate (--lr, --min-lr, --lr-warmup-init), the weight decay "
                "(--weight-decay, --start-weight-decay, --end-weight-decay, "
                "--weight-decay-incr-style) or the schedule (--lr-decay-style and the lengths of "
                "decay and warm-up)"
            )
    yield from found


def _values(args: Any) -> ScheduleValues | None:
    """Return the scheduler's values; None if the arguments do not determine them."""
    if getattr(args, "lr", None) is None:
        return None
    sized = copy.copy(args)
    # Megatron computes a missing batch size. It scales all lengths alike.
    sized.global_batch_size = getattr(args, "global_batch_size", None) or 1
    try:
        return values_of(sized)
    except PlanError:
        return None


def _rate_problems(args: Any) -> Iterator[str]:
    lr, lowest = getattr(args, "lr", None), getattr(args, "min_lr", None)
    begin = getattr(args, "lr_warmup_init", None)
    if lowest is not None and lowest < 0.0:
        yield f"--min-lr {lowest:g}: expected a learning rate of at least 0. Correct it"
    elif lr is not None and lowest is not None and lr < lowest:
        yield (
            f"--lr {lr:g} is below --min-lr {lowest:g}: Megatron's schedule falls from --lr to "
            f"--min-lr. Write --min-lr {lr:g} or less, or a larger --lr"
        )
    if lr is not None and begin is not None and begin > lr:
        yield (
            f"--lr-warmup-init {begin:g} is above --lr {lr:g}: Megatron's warm-up rises to --lr. "
            f"Write --lr-warmup-init {lr:g} or less, or a larger --lr"
        )


def _weight_decay_problems(args: Any) -> Iterator[str]:
    style = getattr(args, "weight_decay_incr_style", None)
    ends: dict[str, Any] = {n: getattr(args, f"{n}_weight_decay", None) for n in ("start", "end")}
    given = {f"--{n}-weight-decay": value for n, value in ends.items() if value is not None}
    words = " ".join(f"{flag} {value:g}" for flag, value in given.items())
    constant = getattr(args, "weight_decay", None)
    if style == "constant" and constant is not None and constant < 0.0:
        yield f"--weight-decay {constant:g}: expected a number of at least 0. Correct it"
    elif style == "constant":
        # Megatron's validation sets both to the constant value.
        if given and not (is_validated(args) and set(given.values()) == {constant}):
            yield (
                f"{words} with --weight-decay-incr-style constant and --weight-decay {constant}: "
                "Megatron takes a start and an end for a ramp only. Leave them out, or write "
                "--weight-decay-incr-style linear or cosine"
            )
    elif style is not None and len(given) < 2:
        yield (
            f"--weight-decay-incr-style {style} with {words or 'neither start nor end'}: a ramp "
            "needs both. Write --start-weight-decay and --end-weight-decay, or "
            "--weight-decay-incr-style constant and --weight-decay"
        )
    elif style is not None and (ends["start"] < 0.0 or ends["end"] < ends["start"]):
        wrong = "falls" if ends["end"] < ends["start"] else "begins below 0"
        yield (
            f"{words}: this ramp {wrong}, and Megatron's weight decay only rises, from 0 or more. "
            "Write an end that is not below the start, or --weight-decay-incr-style constant with "
            "--weight-decay and without the two"
        )


def _schedule_problems(args: Any) -> Iterator[str]:
    if hasattr(args, "lr") and args.lr is None:
        yield "there is no --lr, and Megatron's schedule needs one. Give it"
    both = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
    if all(getattr(args, name, False) for name in both):
        yield (
            "--override-opt_param-scheduler takes the schedule from the arguments and "
            "--use-checkpoint-opt_param-scheduler from the checkpoint. Leave one of the two out"
        )
    for unit in ("iters", "samples"):
        warmup = getattr(args, f"lr_warmup_{unit}", 0) or 0
        decay = getattr(args, f"lr_decay_{unit}", None)
        flag = f"--lr-decay-{unit}"
        if decay is not None and decay <= 0:
            yield f"{flag} {decay}: expected a length of at least 1. Correct it or leave it out"
            continue
        decay = decay or getattr(args, f"train_{unit}", None)
        if decay is not None and warmup and warmup >= decay:
            yield (
                f"--lr-warmup-{unit} {warmup} is not shorter than the decay of {decay} {unit} "
                f"({flag}, or --train-{unit}): the schedule would end before its warm-up does. "
                "Make the decay longer or the warm-up shorter"
            )
    fraction = getattr(args, "lr_warmup_fraction", None)
    if fraction is not None and fraction >= 1.0:
        yield (
            f"--lr-warmup-fraction {fraction:g}: the warm-up is not shorter than the decay; "
            "expected a number below 1"
        )
    if _lacks_decay_length(args):
        flag = f"--lr-wsd-decay-{_unit(vars(args))}"
        yield (
            f"--lr-decay-style WSD without {flag}: Megatron needs the length of the final decay. "
            f"Write {flag}, or another --lr-decay-style"
        )


def _lacks_decay_length(args: Any) -> bool:
    return getattr(args, "lr_decay_style", None) == "WSD" and _length(vars(args)) is None


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
    if state is None:
        return
    yield from _unequal_weight_decay(context, state)
    if "lr_decay_style" not in taken:
        return
    if state.get("lr_decay_style") == "WSD":
        yield from _decay_length(context)
        yield from _differing(context, "lr_wsd_decay_style", "the form of WSD's final decay")
    position = 0 if context.policy.restarts_schedule else state.get("num_steps") or 0
    if position < (state.get("lr_warmup_steps") or 0):
        yield from _differing(
            context, "lr_warmup_init", "the learning rate at which the warm-up starts"
        )


def _unequal_weight_decay(context: ResumeContext, state: Mapping[str, Any]) -> Iterator[str]:
    """Check what the scheduler asserts in the load if its weight decay is constant (line 173)."""
    values = _values(context.args)
    if values is None:
        return
    after = resumed(context.policy, values, state)
    if after.wd_incr_style != "constant" or after.start_wd == after.end_wd:
        return
    kept = [n for n in ("start_wd", "end_wd") if n in saved_values(context.policy)]
    found = " and ".join(f"{name} {state.get(name)}" for name in kept)
    yield (
        f"{found} of the checkpoint with the rest of the arguments' weight decay: it would go from "
        f"{after.start_wd:g} to {after.end_wd:g}, but --weight-decay-incr-style constant needs one "
        "value. Keep weight_decay, which takes all of it from the checkpoint, or neither start_wd "
        "nor end_wd"
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
    if now is None and _lacks_decay_length(args):
        return  # `argument_problems` says so
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
