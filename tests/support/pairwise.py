"""A few cells of a matrix in which every pair of values appears."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

Cell = tuple[str, ...]
Pair = tuple[int, str, int, str]


def pairs(cell: Cell) -> set[Pair]:
    """The pairs of values in a cell, each value with the position of its factor."""
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(cell), 2)}


def covering(factors: Sequence[Sequence[str]], allowed: Callable[[Cell], bool]) -> list[Cell]:
    """Choose cells until every pair that an allowed cell has is in one of them.

    Greedy and deterministic: the next cell has the most new pairs; among equals, the values that
    were used least.
    """
    candidates = {c: pairs(c) for c in itertools.product(*factors) if allowed(c)}
    left = set().union(*candidates.values())
    used: Counter[tuple[int, str]] = Counter()
    chosen: list[Cell] = []
    while left:
        candidates = {c: new for c, of_it in candidates.items() if (new := of_it & left)}
        best = max(
            candidates,
            key=lambda c: (len(candidates[c]), -sum(used[v] for v in enumerate(c))),
        )
        left -= candidates[best]
        used.update(enumerate(best))
        chosen.append(best)
    return chosen
