"""The global batch size of a run at a position in its data. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Suffixes of the numbers in ``--step-batch-size-schedule``.
_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def batch_size_at(args: Mapping[str, Any], consumed_samples: int) -> int | None:
    """Return the global batch size of a run's next iteration, in samples; None if it is not known.

    With ``--step-batch-size-schedule`` Megatron sets ``global_batch_size`` to micro batch size
    times data parallel size, which no iteration needs to have. ``--rampup-batch-size`` depends on
    the version: megatron-core 0.19 ignores it.

    Args:
        args: Megatron's arguments by name, validated.
        consumed_samples: The run's position in the training data.
    """
    if args.get("rampup_batch_size") is not None or args.get("decrease_batch_size_if_needed"):
        return None
    schedule = args.get("step_batch_size_schedule")
    if schedule is None:
        size = args.get("global_batch_size")
        return int(size) if size else None
    try:
        steps = _steps(str(schedule), int(args["seq_length"]))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    return next((size for begin, size in reversed(steps) if consumed_samples >= begin), None)


def _steps(schedule: str, seq_length: int) -> list[tuple[int, int]]:
    """Parse a schedule as Megatron does (core/num_microbatches_calculator.py:502, 0.19.2).

    Returns:
        First sample and global batch size of every step, in order. A schedule counts tokens.
    """
    steps = []
    for entry in schedule.replace(",", " ").split():
        tokens, size = (_number(text) for text in entry.split(":", 1))
        steps.append((tokens // seq_length, size))
    return sorted(steps)


def _number(text: str) -> int:
    text = text.strip().upper()
    factor = _SUFFIXES.get(text[-1:], 1)
    return int(float(text if factor == 1 else text[:-1]) * factor)
