"""Compute the counters of a forecast: those of the checkpoint and those of the resumed run."""

from __future__ import annotations

from typing import Any

from ..checkpoint.stored import StoredCheckpoint
from ..errors import CheckpointError
from ..policy.batch_size import batch_size_at
from ..policy.counters import Counters, begin, overridden
from ..policy.phase import Phase
from ..policy.policy import ResumePolicy
from .planned_arguments import state_of


def saved_counters(stored: StoredCheckpoint) -> Counters:
    """Read the counters of a checkpoint.

    Raises:
        CheckpointError: One of them is no whole number.
    """
    position = state_of(stored).get("num_steps")
    names = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
    return Counters(
        stored.iteration,
        **{name: _whole(stored, name, stored.args.get(name) or 0) for name in names},
        num_steps=None if position is None else _whole(stored, "num_steps", position),
    )


def _whole(stored: StoredCheckpoint, name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise CheckpointError(
            f"{stored.directory}: {name} is {value!r}; expected a whole number. The checkpoint is "
            "damaged: take another one"
        ) from None


def begun(
    stored: StoredCheckpoint, args: Any, policy: ResumePolicy, offset: int
) -> tuple[Counters, int]:
    """Compute the counters with which a run begins, and its offset.

    Args:
        stored: The checkpoint.
        args: The arguments of the resumed run.
        policy: The policy, without operations that have been done already.
        offset: Offset of the checkpoint's phase, in samples.
    """
    return overridden(*begin(policy, saved_counters(stored), offset), args)


def counters_of(
    stored: StoredCheckpoint, args: Any, phase: Phase | None, dropped: str | None
) -> tuple[Counters, Counters] | None:
    """Return the counters of the checkpoint and of the resumed run; None if they are not known.

    Args:
        stored: The checkpoint.
        args: The arguments of the resumed run.
        phase: The phase that begins or continues; None if no optimizer is loaded.
        dropped: The flag that drops the optimizer's state, if one is given.
    """
    saved = saved_counters(stored)
    if phase is not None:
        return saved, begun(stored, args, phase.policy, 0)[0]
    if not dropped:
        return None
    kept = dropped != "--finetune"
    position = None if saved.num_steps is None else 0
    after = Counters(
        saved.iteration if kept else 0,
        saved.consumed_train_samples if kept else 0,
        saved.skipped_train_samples if kept else 0,
        saved.consumed_valid_samples if kept else 0,
        position,
    )
    return saved, overridden(after, 0, args)[0]


def batch_sizes(
    stored: StoredCheckpoint, arguments: tuple[Any, Any], at: tuple[Counters, Counters]
) -> tuple[int, int] | None:
    """Return the global batch sizes of the checkpoint's run and of the resumed one, in samples.

    Args:
        stored: The checkpoint.
        arguments: The arguments of the checkpoint's run and of the resumed run.
        at: The counters of the checkpoint and of the resumed run.

    Returns:
        The size of each run at its position; None if one is not known.
    """
    earlier, now = ({k: v for k, v in vars(args).items() if v is not None} for args in arguments)
    model = {"seq_length": stored.args.get("seq_length")}
    before = batch_size_at({**model, **earlier, **stored.args}, at[0].consumed_train_samples)
    after = batch_size_at({**model, **now}, at[1].consumed_train_samples)
    return None if before is None or after is None else (before, after)
