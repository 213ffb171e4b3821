"""Warn about a learning rate or weight decay that rises at a resume. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .decisions import ResumePlan

#: Above this ratio of the first resumed value to the last used one there is a warning.
_LARGE = 1.5
#: Key of a param_group -> its name, and what to do if the rise was not intended.
_KEYS = {
    "lr": (
        "learning rate",
        "To go on at the last rate, lower --lr or keep the end of the decay (--lr-decay-iters, "
        "--lr-decay-samples) where it was; to begin the schedule again, give --selective-schedule "
        "restart and a warm-up",
    ),
    "weight_decay": (
        "weight decay",
        "To go on at the last value, set --weight-decay (or --start-weight-decay and "
        "--end-weight-decay) to it",
    ),
}


def jumps(plan: ResumePlan, first: Mapping[int, tuple[float, float]]) -> tuple[str, ...]:
    """Warn if the first resumed step has a much higher learning rate or weight decay.

    A saved param_group has the values at the checkpoint's position in the schedule. A schedule that
    goes on as it was has them at the first resumed step too.

    Args:
        plan: The plan of one optimizer of the chain.
        first: Position of a param_group -> learning rate and weight decay of the first resumed
            step.

    Returns:
        Texts of some sentences. None if the schedule begins again, as that was requested.
    """
    if plan.policy.restarts_schedule:
        return ()
    return tuple(
        text for number, key in enumerate(_KEYS) for text in _of_key(plan, key, first, number)
    )


def _of_key(
    plan: ResumePlan, key: str, first: Mapping[int, tuple[float, float]], number: int
) -> Iterator[str]:
    groups: dict[tuple[float, float], list[int]] = {}
    for group in plan.groups:
        saved = next((d.checkpoint for d in group.decisions if d.key == key), None)
        if group.index in first and isinstance(saved, int | float):
            pair = (float(saved), first[group.index][number])
            groups.setdefault(pair, []).append(group.index)
    name, remedy = _KEYS[key]
    for (last, value), indices in groups.items():
        # Before the first step of a warm-up the rate is 0.
        if value <= _LARGE * last or (key == "lr" and last <= 0.0):
            continue
        ratio = f"{value / last:.2f}x the last used one, " if last > 0.0 else "and the last was "
        yield (
            f"the first resumed {name} is {value:.6g}, {ratio}{last:.6g} (param_group "
            f"{', '.join(map(str, indices))}), and the schedule does not begin again. {remedy}"
        )
