"""The counters of a run at a phase change: iteration, data position, schedule position. Pure.

In an ordinary run the three move together: after i iterations of B samples, the data position and
the scheduler's num_steps are both i B. Each can be reset separately. From then on they differ by an
offset, which is stored in the phase's mark.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .policy import ResumePolicy

_RAMPS = ("rampup_batch_size", "step_batch_size_schedule")


@dataclass(frozen=True)
class Counters:
    """The position of a run.

    Args:
        iteration: Training iterations done.
        consumed_train_samples: Position in the training data.
        skipped_train_samples: How many of these samples were skipped.
        consumed_valid_samples: Position in the validation data.
        num_steps: The scheduler's position, in samples; None without a scheduler.
    """

    iteration: int
    consumed_train_samples: int
    skipped_train_samples: int = 0
    consumed_valid_samples: int = 0
    num_steps: int | None = None


def ramp_of(args: Any) -> str | None:
    """Return the argument that changes the batch size during a run, or None."""
    return next((name for name in _RAMPS if getattr(args, name, None) is not None), None)


def begin(policy: ResumePolicy, saved: Counters, offset: int) -> tuple[Counters, int]:
    """Compute the counters with which a phase begins, and its offset.

    Args:
        policy: The policy, without operations that have been done already.
        saved: The checkpoint's counters.
        offset: Offset of the checkpoint's phase, in samples.
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


def overridden(counters: Counters, offset: int, args: Any) -> tuple[Counters, int]:
    """Apply ``--override-ckpt-iteration``, which stock applies to what it has read.

    Stock sets the iteration and computes the data position from it, and leaves the schedule where
    the checkpoint has it (training/checkpointing.py:2440, 0.19.2).

    Args:
        counters: The counters with which the phase would begin.
        offset: Its offset, in samples.
        args: Megatron's arguments. Versions before 0.19 do not have the flag.
    """
    target = getattr(args, "override_ckpt_iteration", None)
    if target is None:
        return counters, offset
    size = getattr(args, "global_batch_size", None)
    consumed = target * size if size else counters.consumed_train_samples
    after = replace(
        counters, iteration=target, consumed_train_samples=consumed, skipped_train_samples=0
    )
    return after, 0


def first_iteration(args: Any, reset_iteration: bool, saved: int) -> int:
    """Return the iteration at which a run goes on.

    Args:
        args: Megatron's arguments.
        reset_iteration: Whether the iteration is reset.
        saved: The checkpoint's iteration.
    """
    target = getattr(args, "override_ckpt_iteration", None)
    if target is not None:
        return int(target)
    return 0 if reset_iteration else saved


def last_iteration(
    counters: Counters, offset: int, train_samples: int, global_batch_size: int
) -> int:
    """Compute the iteration at which ``--train-samples`` are reached with a constant batch size.

    Stock divides the samples by the current batch size, which is wrong once it has changed
    (`update_train_iters`, training/training.py:1528, 0.19.2).

    Args:
        counters: The position of the run.
        offset: Offset of its phase, in samples.
        train_samples: The argument; it counts samples from the iteration's 0.
        global_batch_size: The current batch size, in samples.
    """
    counted = counters.consumed_train_samples - offset
    return counters.iteration + max(0, train_samples - counted) // global_batch_size


def samples_needed(counters: Counters, last: int, global_batch_size: int) -> int:
    """Compute how many samples of training data the run needs to reach its last iteration.

    Args:
        counters: The position of the run.
        last: Its last iteration.
        global_batch_size: The current batch size in samples, which stays constant.
    """
    return counters.consumed_train_samples + max(0, last - counters.iteration) * global_batch_size
