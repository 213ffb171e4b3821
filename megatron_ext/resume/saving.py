"""Save the state that the run has, also where a bucket of the optimizer's buffers is padded.

The save by parameter (``fully_reshardable``) gathers a buffer without the padding at the end of its
buckets, but cuts it at offsets that count the padding (core/optimizer/distrib_optimizer.py:1376 and
:1747, 0.16.1 to 0.19.2; mended on its main branch by #5077). From the second bucket on the stored
tensors are then shifted, and the last ones end in zeros.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .steps import step_of

_LOGGER = "megatron.core.optimizer.distrib_optimizer"


def put_right(optimizer: Any, state: Mapping[int, Mapping[str, Any]], gathered: Any) -> None:
    """Give every entry of a save by parameter the elements of its parameter.

    Args:
        optimizer: The DistributedOptimizer.
        state: Number of the parameter -> state key -> its sharded entry. It is modified in place.
        gathered: The buffers without the padding between buckets, by buffer, dtype and state key.
    """
    number = 0
    for index, ranges in enumerate(optimizer.gbuf_ranges):
        buffer = optimizer.buffers[index]
        (dtype,) = ranges
        stripped = _stripped_before(buffer)
        for begin, end, bucket in buffer.param_index_map.values():
            first = begin - stripped[bucket]
            for key, entry in state[number].items():
                world = gathered[index][dtype][key]
                entry.data = world[first : first + end - begin].view(entry.data.shape)
            number += 1


def step_of_rank(members: Sequence[Any]) -> int:
    """Return the largest step of this rank's optimizers that train a parameter; 0 without one."""
    return max((step_of(m.optimizer) or 0 for m in members if _trains(m)), default=0)


def set_step(members: Sequence[Any], step: int) -> None:
    """Set the step of optimizers that train nothing on this rank.

    An inner optimizer counts no step for a group without parameters. If rank 0 stores such groups
    for all ranks, the step would be lost, or be that of the last load.

    Args:
        members: The optimizers on this rank.
        step: The step of the other ranks; 0 before the first.
    """
    for member in members:
        if step and member.optimizer is not None and not _trains(member):
            for group in member.optimizer.param_groups:
                group["step"] = step


def _trains(member: Any) -> bool:
    inner = member.optimizer
    return inner is not None and any(group["params"] for group in inner.param_groups)


def _stripped_before(buffer: Any) -> list[int]:
    """Count the elements of padding before each bucket that the gathered buffer does not have."""
    out = [0]
    for bucket in buffer.buckets:
        out.append(out[-1] + bucket.grad_data.numel() - bucket.numel_unpadded)
    return out


@contextlib.contextmanager
def without_the_warning() -> Iterator[None]:
    """Drop Megatron's warning about data corruption, which `put_right` prevents."""

    def keep(record: logging.LogRecord) -> bool:
        return "data corruption" not in record.getMessage()

    logger = logging.getLogger(_LOGGER)
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
