"""Settings of an edit that Megatron's scheduler overwrites before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import PolicyError

#: Keys that the scheduler computes for every group at load (OptimizerParamScheduler.step,
#: core/optimizer_param_scheduler.py:284, 0.18.2 and 0.19.2; :281, 0.16.1). Groups may differ in
#: them.
COMPUTED = ("lr", "weight_decay")
#: What it computes weight_decay from: a group's own bounds, or its own (get_wd, the same file).
DECAY_BOUNDS = ("start_wd", "end_wd")


def refuse_overwritten(
    settings: Mapping[str, Any], schedulers: Iterable[tuple[str, Any, Mapping[str, Any]]]
) -> None:
    """Refuse settings that Megatron's scheduler overwrites before the first step.

    Args:
        settings: Key -> new value.
        schedulers: Each saved scheduler: its place, its path there, its state.

    Raises:
        PolicyError: A setting would have no effect, or means nothing for a schedule.
    """
    if "lr" in settings:
        raise PolicyError(
            "--set lr: Megatron's scheduler computes lr before the first step, so that this value "
            "would have no effect; expected max_lr and min_lr, which it computes lr from"
        )
    value = settings.get("weight_decay")
    if value is None:
        return
    given = [f"{b}={settings[b]}" for b in DECAY_BOUNDS if settings.get(b, value) != value]
    if given:
        raise PolicyError(
            f"--set weight_decay={value} {' '.join(given)}: Megatron's scheduler computes "
            "weight_decay from start_wd and end_wd, so that these contradict each other. Leave "
            "weight_decay out, or set all three to one value"
        )
    for where, path, state in schedulers:
        start, end = (state.get(b) for b in DECAY_BOUNDS)
        if start != end and not settings.keys() >= set(DECAY_BOUNDS):
            raise PolicyError(
                f"--set weight_decay: {path[0]} of {where} changes weight_decay from {start!r} "
                f"(start_wd) to {end!r} (end_wd). Set start_wd and end_wd"
            )


def no_effect(named: bool) -> PolicyError:
    """Make the error for a weight decay that no saved bound could hold.

    Args:
        named: Whether ``--group`` chose the param_groups.
    """
    return PolicyError(
        "--set weight_decay: Megatron's scheduler computes weight_decay from its own start_wd and "
        "end_wd, and "
        + (
            "the param_groups that --group chooses have none of their own. Leave out --group: "
            "param_groups with wd_mult 0 keep a weight decay of 0"
            if named
            else "this checkpoint holds neither. Leave weight_decay out and give --weight-decay to "
            "the run"
        )
    )
