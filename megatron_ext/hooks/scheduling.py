"""Wrap the load of the learning rate and weight decay scheduler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from ..base.log import say
from ..errors import HostError
from ..host.arguments import global_args
from ..host.schedule import NOT_SAVED, SCHEDULER_VALUES, saved_values
from ..report.schema import LengthDocument, SchedulerDocument
from ..report.schema_parts import FirstStepDocument, ScheduledValueDocument
from ..resume.members import members_of
from .counters import length_of_run


def load_scheduler(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `OptimizerParamScheduler.load_state_dict`, so that it follows the optimizer's policy."""

    @functools.wraps(original)
    def load_state_dict(self: Any, state_dict: Mapping[str, Any]) -> None:
        members = members_of(self.optimizer)
        if not members:
            original(self, state_dict)
            return
        policy = members[0].resume.policy
        flags = (self.override_opt_param_scheduler, self.use_checkpoint_opt_param_scheduler)
        from_checkpoint = policy.schedule == "checkpoint"
        if flags[1] and not from_checkpoint:
            say(
                "megatron_ext: the scheduler was built with "
                "use_checkpoint_opt_param_scheduler=True; the policy decides, and takes its values "
                "from the current arguments. With schedule: checkpoint in the policy they come "
                "from the checkpoint"
            )
        self.override_opt_param_scheduler = not from_checkpoint
        self.use_checkpoint_opt_param_scheduler = from_checkpoint
        arguments = _scheduler_values(self)
        if from_checkpoint and state_dict.get("lr_decay_style") == "WSD":
            _require_decay_length(arguments)
        try:
            original(self, state_dict)
        finally:
            self.override_opt_param_scheduler, self.use_checkpoint_opt_param_scheduler = flags
        for name in policy.kept_scheduler_attributes:
            if name in state_dict:
                setattr(self, name, state_dict[name])
        phase = members[0].resume.phase
        if phase is not None and phase.policy.restarts_schedule:
            self.num_steps = 0
        # Stock computes the first step's weight decay before it has restored start_wd and end_wd
        # (core/optimizer_param_scheduler.py:341, 0.19.2).
        self.step(0)
        length = length_of_run(members[0].resume, global_args())
        section = scheduler_section(self, state_dict, arguments, members, length)
        members[0].resume.scheduler_loaded(section)

    return load_state_dict


def _require_decay_length(arguments: Mapping[str, Any]) -> None:
    """Raise if the length of WSD's final decay is unknown; for callers without a preflight.

    Raises:
        HostError: The scheduler was built without it.
    """
    if arguments["wsd_decay_steps"] is None:
        raise HostError(
            "the schedule is taken from the checkpoint and is WSD, and no checkpoint has the "
            "length of its final decay. Give --lr-wsd-decay-iters (or --lr-wsd-decay-samples), as "
            "wsd_decay_steps of OptimizerParamScheduler"
        )


def _scheduler_values(scheduler: Any) -> dict[str, Any]:
    found = {name: getattr(scheduler, name) for name in SCHEDULER_VALUES}
    return found | {name: getattr(scheduler, name, None) for name in NOT_SAVED}


def scheduler_section(
    scheduler: Any,
    state_dict: Mapping[str, Any],
    arguments: Mapping[str, Any],
    members: list[Any],
    length: LengthDocument,
) -> SchedulerDocument:
    """Build the scheduler's part of the report.

    Args:
        scheduler: Megatron's scheduler, after its load.
        state_dict: The state that it has loaded.
        arguments: Its values before the load.
        members: The optimizers of the chain.
        length: The result of `hooks.counters.length_of_run`.
    """
    from_checkpoint = saved_values(members[0].resume.policy)
    values: dict[str, ScheduledValueDocument] = {
        name: {
            "checkpoint": state_dict.get(name),
            "argument": arguments[name],
            "value": value,
            "taken": "checkpoint" if name in from_checkpoint else "arguments",
        }
        for name, value in _scheduler_values(scheduler).items()
    }
    first: list[FirstStepDocument] = [
        {
            "optimizer": number,
            "group": index,
            "lr": float(group["lr"]),
            "weight_decay": float(group["weight_decay"]),
        }
        for number, member in enumerate(members)
        for index, group in enumerate(member.optimizer.param_groups)
    ]
    return {
        "num_steps": scheduler.num_steps,
        **length,
        "values": values,
        "first_step": first,
    }
