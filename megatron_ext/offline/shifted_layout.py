"""How a buffer of gradients can be laid out. Pure.

A buffer has its parameters one after the other, each from a multiple of 64 on. Some of them end a
bucket, whose end is padded to a multiple of a divisor
(``_compute_per_buffer_param_layout``, core/optimizer/distrib_optimizer.py:506, 0.19.2). Stock
Megatron 0.16 to 0.19 gathers the buffer without the padding at the end of its buckets, but cuts it
at offsets that count the padding. So the parameter at ``[begin, end)`` is in the gathered buffer at
``[begin - shift, end - shift)``, where ``shift`` is the padding of the buckets before, and what is
stored under its name is the gathered buffer's ``[begin, end)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .bucket_edges import ALIGNMENT

#: Of ``lcm(data-parallel size, 128)`` and of ``--ddp-pad-buckets-for-high-nccl-busbw``
#: (bucket_end_divisor, core/optimizer/param_layout.py:31, 0.19.2).
_DIVISORS = (128, 1 << 16)
#: Data-parallel sizes that are tried if the checkpoint has not its run's.
_MOST_RANKS = 1024


@dataclass(frozen=True)
class Part:
    """What is known of a parameter before the layout is.

    Args:
        elements: Number of elements.
        shift: The shift that its own elements show; None if they show none for certain.
        shared: Whether it is an embedding that pipeline stages may share. It is then a bucket of
            its own.
        stored: Whether this rank has stored what it had under the parameter's name.
    """

    elements: int
    shift: int | None = None
    shared: bool = False
    stored: bool = True


@dataclass(frozen=True)
class Place:
    """Where a parameter is in a buffer.

    Args:
        begin: First element, with the padding of all buckets before.
        end: One past the last element.
        shift: Number of elements of that padding.
    """

    begin: int
    end: int
    shift: int


@dataclass(frozen=True)
class _State:
    """A layout of the first parameters.

    Args:
        next: Where the next one begins.
        shift: Its shift, without that of the first one.
        first: The shift of the first one; None as long as it is not known.
        bucket: Where its bucket begins.
        above: The bucket size is larger than this.
        most: The bucket size is at most this.
    """

    next: int
    shift: int
    first: int | None
    bucket: int
    above: float = 0
    most: float = math.inf


def divisors(data_parallel: int | None) -> list[int]:
    """List what the end of a bucket can be a multiple of.

    Args:
        data_parallel: Number of data-parallel ranks; None if it is not known.
    """
    sizes = range(1, _MOST_RANKS + 1) if data_parallel is None else [data_parallel]
    found = [[math.lcm(size, least) for size in sizes] for least in _DIVISORS]
    return list(dict.fromkeys(d for some in found for d in sorted(some)))


def layouts(
    parts: Sequence[Part], divisor: int, *, shared: bool = False, whole: bool = True
) -> Iterator[tuple[Place, ...]]:
    """List the layouts in which every parameter has the shift that its elements show.

    A bucket ends with the parameter that makes it as large as the bucket size, which is one number
    for a buffer and is not known here.

    Args:
        parts: The parameters in the order of the buffer.
        divisor: The end of a bucket is a multiple of it.
        shared: Whether a shared embedding is a bucket of its own.
        whole: Whether the first parameter is the first of the buffer. Otherwise others, of which
            nothing is stored, come before in buckets of their own.
    """
    begun = _State(0, 0, 0 if whole else None, 0)
    left: list[tuple[_State, tuple[Place, ...]]] = [(begun, ())]
    while left:
        state, places = left.pop()
        if len(places) == len(parts):
            if state.first is not None:
                first = state.first
                yield tuple(Place(p.begin, p.end, p.shift + first) for p in places)
            continue
        part = parts[len(places)]
        if shared and part.shared and state.bucket < state.next:
            state = _next_bucket(state, _aligned(state.next), divisor)
        if part.shift is not None:
            first = part.shift - state.shift if state.first is None else state.first
            if first < 0 or first + state.shift != part.shift:
                continue
            state = replace(state, first=first)
        begin = _aligned(state.next)
        end = begin + part.elements
        now = (*places, Place(begin, end, state.shift))
        size = end - state.bucket
        if shared and part.shared:
            left.append((_next_bucket(state, end, divisor), now))
            continue
        if state.above < min(size, state.most):
            ended = _next_bucket(state, end, divisor)
            left.append((replace(ended, most=min(size, state.most)), now))
        if (above := max(size, state.above)) < state.most:
            left.append((replace(state, next=end, above=above), now))


def _aligned(at: int) -> int:
    return -(-at // ALIGNMENT) * ALIGNMENT


def _next_bucket(state: _State, end: int, divisor: int) -> _State:
    begin = -(-end // divisor) * divisor
    return replace(state, next=begin, bucket=begin, shift=state.shift + begin - end)
