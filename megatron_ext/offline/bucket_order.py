"""Decide which of several equal weights lies where, by the order of a model's parameters. Pure.

Norm weights that are all one, or biases that are all zero, are found in many places. A buffer holds
the parameters in the reverse order of their registration
(core/optimizer/distrib_optimizer.py:547, 0.19.2): later layers come first, and the parameters of a
layer have the same order in every layer. Where no layer tells that order, it is the one of
Megatron's own layers.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from . import registration
from .bucket_weights import Weight

_LAYER = re.compile(r"(?P<stack>(?:.*?\.)?layers)\.(?P<number>\d+)\.(?P<rest>.+)", re.DOTALL)


@dataclass
class Buffer:
    """The parts of one buffer, in its order.

    Args:
        owner: The model-parallel rank; a weight lies in its buffers once.
        candidates: For each part the weights that it may be. `decide` leaves out those that it
            cannot be.
    """

    owner: Hashable
    candidates: list[list[Weight]]


@dataclass(frozen=True)
class _Place:
    """A weight's place in the model: its layers, the layer's number, and the parameter in it."""

    stack: str
    number: int
    rest: tuple[str, Hashable]

    @classmethod
    def of(cls, weight: Weight) -> _Place | None:
        found = _LAYER.fullmatch(weight.name)
        if found is None:
            return None
        # The halves of a gated layer have one name.
        return cls(found["stack"], int(found["number"]), (found["rest"], weight.shard))


def decide(buffers: Iterable[Buffer]) -> None:
    """Leave out the candidates that cannot be.

    Args:
        buffers: The buffers of all model-parallel ranks; they are modified.
    """
    buffers = list(buffers)
    before = math.inf
    while (count := sum(len(c) for s in buffers for c in s.candidates)) < before:
        before = count
        _once(buffers)
        for buffer in buffers:
            _layers_descend(buffer)
        if any(len(c) > 1 for s in buffers for c in s.candidates):
            known = _known_order(buffers)
            for buffer in buffers:
                _keep_order(buffer, known)
                _sort(buffer, known)


def _once(buffers: Iterable[Buffer]) -> None:
    """A weight that is one part is no other part of the same rank."""
    taken: dict[Hashable, set[int]] = defaultdict(set)
    for buffer in buffers:
        taken[buffer.owner].update(id(c[0]) for c in buffer.candidates if len(c) == 1)
    for buffer in buffers:
        for candidates in buffer.candidates:
            if len(candidates) > 1:
                candidates[:] = [c for c in candidates if id(c) not in taken[buffer.owner]]


def _certain(buffer: Buffer) -> dict[str, list[tuple[int, _Place]]]:
    """Return layers -> the parts that are certainly theirs, in order."""
    certain: dict[str, list[tuple[int, _Place]]] = defaultdict(list)
    for at, candidates in enumerate(buffer.candidates):
        if len(candidates) == 1 and (place := _Place.of(candidates[0])) is not None:
            certain[place.stack].append((at, place))
    return certain


def _filter(buffer: Buffer, possible: Callable[[int, Weight], bool]) -> None:
    for at, candidates in enumerate(buffer.candidates):
        if len(candidates) > 1:
            candidates[:] = [c for c in candidates if possible(at, c)]


def _layers_descend(buffer: Buffer) -> None:
    """Later layers come first, and between two parameters of layers lies nothing else."""
    certain = _certain(buffer)

    def possible(at: int, weight: Weight) -> bool:
        mine = _Place.of(weight)
        for stack, known in certain.items():
            there = bisect.bisect_left(known, at, key=lambda k: k[0])
            before = known[there - 1][1].number if there else math.inf
            after = known[there][1].number if there < len(known) else -math.inf
            if mine is not None and mine.stack == stack:
                if not after <= mine.number <= before:
                    return False
            elif 0 < there < len(known):
                return False
        return True

    _filter(buffer, possible)


#: Layers and two of their parameters, of which the first comes before the second.
_Order = set[tuple[str, Hashable, Hashable]]


def _known_order(buffers: Sequence[Buffer]) -> _Order:
    """Learn the order of a layer's parameters, as far as one of them is still in question.

    What certain parts show comes before Megatron's own order.
    """
    open_ = {
        place.rest
        for buffer in buffers
        for candidates in buffer.candidates
        if len(candidates) > 1
        for place in map(_Place.of, candidates)
        if place is not None
    }
    order: _Order = set()
    for buffer in buffers:
        for stack, known in _certain(buffer).items():
            for _, layer in itertools.groupby((p for _, p in known), key=lambda p: p.number):
                for first, second in itertools.combinations([p.rest for p in layer], 2):
                    if first in open_ or second in open_:
                        order.add((stack, first, second))
    own = {(stack, a, b) for stack, a, b in _own_order(buffers) if (stack, b, a) not in order}
    # What two layers contradict is no order.
    return own | {(stack, a, b) for stack, a, b in order if (stack, b, a) not in order}


def _own_order(buffers: Sequence[Buffer]) -> _Order:
    """Return the order in which Megatron's own layers register these parameters, reversed."""
    places = {
        (place.stack, place.rest)
        for buffer in buffers
        for candidates in buffer.candidates
        for place in map(_Place.of, candidates)
        if place is not None
    }
    return {
        (stack, later, earlier)
        for stack, earlier in places
        for other, later in places
        if other == stack and registration.comes_first(earlier[0], later[0])
    }


def _keep_order(buffer: Buffer, order: _Order) -> None:
    certain = _certain(buffer)

    def possible(at: int, weight: Weight) -> bool:
        mine = _Place.of(weight)
        if mine is None:
            return True
        known = certain[mine.stack]
        low = bisect.bisect_left(known, -mine.number, key=lambda k: -k[1].number)
        high = bisect.bisect_right(known, -mine.number, key=lambda k: -k[1].number)
        return not any(
            (
                (mine.stack, mine.rest, other.rest)
                if there < at
                else (mine.stack, other.rest, mine.rest)
            )
            in order
            for there, other in known[low:high]
        )

    _filter(buffer, possible)


def _sort(buffer: Buffer, order: _Order) -> None:
    """Decide parts that are the same weights together, if the order of all these is known."""
    alike: dict[frozenset[int], list[list[Weight]]] = defaultdict(list)
    for candidates in buffer.candidates:
        if len(candidates) > 1:
            alike[frozenset(map(id, candidates))].append(candidates)
    for parts in alike.values():
        weights = list(parts[0])
        if len(weights) != len(parts):
            continue
        before = [sum(_comes_first(a, b, order) for a in weights) for b in weights]
        if sorted(before) == list(range(len(weights))):
            for number, weight in zip(before, weights, strict=True):
                parts[number][:] = [weight]


def _comes_first(one: Weight, two: Weight, order: _Order) -> bool:
    a, b = _Place.of(one), _Place.of(two)
    if a is None or b is None or a.stack != b.stack:
        return False
    return a.number > b.number or (a.number == b.number and (a.stack, a.rest, b.rest) in order)
