"""The counters of a run at a phase change: iteration, data position, schedule position. Pure.

Three of them move together in an ordinary run: after i iterations of B samples the data position
and the scheduler's num_steps are both i B. Each can be reset by itself, so from then on they differ
by an offset, which the phase's mark keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .policy import ResumePolicy

_RAMPS = ("rampup_batch_size", "step_batch_size_schedule")


@dataclass(frozen=True)
class Counters:
    """Where a run is.

    Args:
        iteration: Training iterations done.
        consumed_train_samples: Data position.
        skipped_train_samples: Of these, how many were skipped.
        consumed_valid_samples: Position in the validation data.
        num_steps: The scheduler's position, in samples; None where there is no scheduler.
    """

    iteration: int
    consumed_train_samples: int
    skipped_train_samples: int = 0
    consumed_valid_samples: int = 0
    num_steps: int | None = None


def ramp_of(args: Any) -> str | None:
    """The argument by which the batch size changes during a run; None where it does not."""
    return next((name for name in _RAMPS if getattr(args, name, None) is not None), None)


def begin(policy: ResumePolicy, saved: Counters, offset: int) -> tuple[Counters, int]:
    """The counters with which a phase begins, and the new offset.

    Args:
        policy: What is left to do.
        saved: The checkpoint's.
        offset: Of the checkpoint's phase, in samples.
    """
    counted = saved.consumed_train_samples - offset
    after = saved
    if policy.reset_iteration:
        after, counted = replace(after, iteration=0), 0
    if policy.reset_dataloader:
        after = replace(
            after, consumed_train_samples=0, skipped_train_samples=0, consumed_valid_samples=0
        )
    if policy.restarts_schedule and saved.num_steps is not None:
        after = replace(after, num_steps=0)
    return after, after.consumed_train_samples - counted


def last_iteration(
    counters: Counters, offset: int, train_samples: int, global_batch_size: int
) -> int:
    """The iteration at which ``--train-samples`` are reached with a constant batch.

    Stock divides the samples by the current batch size, which is wrong once it has changed
    (`update_train_iters`, training/training.py:1528, 0.19.2).

    Args:
        counters: Where the run is.
        offset: Of its phase.
        train_samples: As in the argument: counted with the iteration.
        global_batch_size: The current one.
    """
    counted = counters.consumed_train_samples - offset
    return counters.iteration + max(0, train_samples - counted) // global_batch_size


def samples_needed(counters: Counters, last: int, global_batch_size: int) -> int:
    """How many samples the training data has to have for the run to reach its last iteration.

    Args:
        counters: Where the run is.
        last: Its last iteration.
        global_batch_size: The current one, constant.
    """
    return counters.consumed_train_samples + max(0, last - counters.iteration) * global_batch_size
