"""Cut a bucket of master weights into the weights of a model. Pure.

A bucket holds one parameter after the other, each from a multiple of 64 elements on. Its master
weights, rounded to the dtype of the model's weights, are these weights bit for bit: that tells
which parameter lies where.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from .bucket_edges import ALIGNMENT, Edges
from .bucket_weights import Slot, Weight, Weights


@dataclass
class Cut:
    """A bucket that was cut into weights.

    Args:
        slots: The parts, in the bucket's order.
        foreign: First element and one past the last of each part that is no weight of the model.
        unclear: The weights that may begin at a place where their lengths differ.
    """

    slots: list[Slot] = field(default_factory=list)
    foreign: list[tuple[int, int]] = field(default_factory=list)
    unclear: list[tuple[Weight, ...]] = field(default_factory=list)


def cut(master: torch.Tensor, dtype: torch.dtype, weights: Weights, edges: Edges) -> Cut:
    """Cut a bucket into the weights of the model.

    The padding that may lie between two parameters is uninitialised memory and is not looked at: it
    is shorter than 64 elements, ends where the next parameter begins or at the bucket's end, and
    the checkpoint's index has it as a piece of its own
    (core/optimizer/distrib_optimizer.py:1907-1938, 0.19.2).

    Args:
        master: The master weights of the bucket, float32.
        dtype: Dtype of the model's weights.
        weights: The weights that it may hold.
        edges: The stored pieces of the bucket.
    """
    done, begin = Cut(), 0
    while begin < len(master):
        ways = _ways(master, begin, dtype, weights, edges)
        through = _through(ways, len(master))
        if through[begin]:
            _walk(through, begin, done)
            return done
        # As far as there is a way; from there on something is no weight of the model.
        stop = max(at for at, further in ways.items() if not further)
        _walk(_through(ways, stop), begin, done)
        later = (at for at in sorted(edges.bounds) if at > stop and at % ALIGNMENT == 0)
        begin = next((at for at in later if weights.at(master, at, dtype)), len(master))
        done.foreign.append((stop, begin))
    return done


#: Element -> what may begin there, with the element at which the next part then begins.
_Ways = dict[int, list[tuple[Slot, int]]]


def _ways(
    master: torch.Tensor, begin: int, dtype: torch.dtype, weights: Weights, edges: Edges
) -> _Ways:
    ways: _Ways = {}
    left = [begin]
    while left:
        at = left.pop()
        if at not in ways and at < len(master):
            found = (
                (slot, _next(slot.end, len(master), edges))
                for slot in weights.at(master, at, dtype)
                if not edges.inside(slot)
            )
            ways[at] = [
                (kept, after)
                for slot, after in found
                if (kept := _possible(slot, after, len(master), weights)) is not None
            ]
            left += [after for _, after in ways[at]]
    return ways


def _possible(slot: Slot, after: int, size: int, weights: Weights) -> Slot | None:
    """Leave out the candidates that a part cannot be, as it begins or ends inside a parameter."""
    inside = slot.begin % ALIGNMENT != 0 or (after % ALIGNMENT != 0 and after < size)
    if not inside:
        return slot
    candidates = tuple(w for w in slot.candidates if w.name in weights.in_pieces)
    return replace(slot, candidates=candidates) if candidates else None


def _next(end: int, size: int, edges: Edges) -> int:
    """Return where the part after one that ends at `end` begins.

    If the index has no padding from there to the next multiple of 64, the parameter goes on: the
    halves of a gated layer are stored one by one (core/transformer/mlp.py:465, 0.19.2).
    """
    aligned = -(-end // ALIGNMENT) * ALIGNMENT
    padded = end in edges.bounds and (aligned in edges.bounds or aligned >= size)
    return aligned if padded else end


def _through(ways: _Ways, end: int) -> _Ways:
    """Keep of the ways what leads to `end` or behind it."""
    kept: _Ways = {}
    for at in sorted(ways, reverse=True):
        kept[at] = [(s, after) for s, after in ways[at] if after >= end or kept.get(after)]
    return kept


def _walk(ways: _Ways, begin: int, done: Cut) -> None:
    """Append the parts of the one way; where there are several, note their weights."""
    at = begin
    while ways.get(at):
        if len(ways[at]) > 1:
            done.unclear.append(tuple(w for slot, _ in ways[at] for w in slot.candidates))
        slot, at = ways[at][0]
        done.slots.append(slot)
