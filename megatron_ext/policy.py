"""What the user asks of a resume: `ResumePolicy`, validated on its own.

A policy says for every hyperparameter whether its value comes from the current arguments (the
default) or from the checkpoint. The Adam moments, the master weights and ``step`` always come
from the checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from .errors import PolicyError

#: Keys that `megatron.core.optimizer_param_scheduler.OptimizerParamScheduler` writes or reads in
#: a param_group. ``--use-checkpoint-opt_param-scheduler`` takes exactly these from the checkpoint.
SCHEDULE_KEYS = ("lr", "max_lr", "min_lr", "weight_decay", "start_wd", "end_wd")

#: Attributes of the scheduler that hold a kept key, because the scheduler overwrites the group's
#: own value from them at every step (`OptimizerParamScheduler.step`).
SCHEDULER_ATTRIBUTES = {
    "max_lr": ("max_lr",),
    "min_lr": ("min_lr",),
    "start_wd": ("start_wd",),
    "end_wd": ("end_wd",),
    "weight_decay": ("start_wd", "end_wd", "wd_incr_steps", "wd_incr_style"),
}

_NOT_A_CHOICE = {
    "params": "the parameters always are the current model's",
    "step": "step is state, not a hyperparameter: it always comes from the checkpoint",
    "lr": (
        "the scheduler computes lr from max_lr and min_lr before every step: "
        "keep 'max_lr' and 'min_lr' instead"
    ),
}


@dataclass(frozen=True)
class ResumePolicy:
    """One decision for every piece of optimizer state at a resume.

    Args:
        keep_hyperparameters: Keys of a param_group (for example ``"betas"``, ``"eps"``,
            ``"max_lr"``, ``"weight_decay"``) whose value comes from the checkpoint. Every other
            key comes from the current arguments.
        schedule: ``"args"``: the scheduler's values come from the current arguments, whether
            ``--override-opt_param-scheduler`` is given or not. ``"checkpoint"``: the scheduler's
            values and the group keys in `SCHEDULE_KEYS` come from the checkpoint, as with
            ``--use-checkpoint-opt_param-scheduler``.

    Raises:
        PolicyError: A key is malformed, or is one that cannot be chosen.
    """

    keep_hyperparameters: tuple[str, ...] = ()
    schedule: Literal["args", "checkpoint"] = "args"

    def __post_init__(self) -> None:
        """Normalise the keys and refuse what can never be carried out."""
        if isinstance(self.keep_hyperparameters, str):
            raise PolicyError(
                f"keep_hyperparameters: expected a sequence of keys, found the string "
                f"{self.keep_hyperparameters!r}; write [{self.keep_hyperparameters!r}]"
            )
        if self.schedule not in ("args", "checkpoint"):
            raise PolicyError(f"schedule: expected 'args' or 'checkpoint', found {self.schedule!r}")
        for key in self.keep_hyperparameters:
            if not isinstance(key, str) or not re.fullmatch(r"\w+", key):
                raise PolicyError(
                    f"--selective-keep-hyperparameters: {key!r} is not a param_group key; "
                    "expected names such as 'betas' or 'weight_decay', separated by spaces"
                )
            if key in _NOT_A_CHOICE:
                raise PolicyError(
                    f"--selective-keep-hyperparameters: {key!r} cannot be kept: "
                    f"{_NOT_A_CHOICE[key]}"
                )
        keys = tuple(dict.fromkeys(self.keep_hyperparameters))
        object.__setattr__(self, "keep_hyperparameters", keys)

    @property
    def kept_keys(self) -> frozenset[str]:
        """The param_group keys that come from the checkpoint."""
        schedule = SCHEDULE_KEYS if self.schedule == "checkpoint" else ()
        return frozenset((*self.keep_hyperparameters, *schedule))

    @property
    def kept_scheduler_attributes(self) -> tuple[str, ...]:
        """The scheduler attributes that come from the checkpoint because a key is kept."""
        names = [a for key in self.keep_hyperparameters for a in SCHEDULER_ATTRIBUTES.get(key, ())]
        return tuple(dict.fromkeys(names))

    def why_kept(self, key: str) -> str:
        """The reason, in the user's words, why `key` comes from the checkpoint."""
        if key in self.keep_hyperparameters:
            return f"--selective-keep-hyperparameters {key}"
        return "--use-checkpoint-opt_param-scheduler"
