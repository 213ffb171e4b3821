"""Find where the state of a buffer's parameters was stored, proven by the model's weights.

What is stored as master weights is compared, rounded, with the weights of all parameters that a
layout has there. A layout is only taken if every stored element agrees.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from .shifted_held import Held
from .shifted_layout import Part, Place, divisors, layouts
from .shifted_needle import shift_of
from .shifted_parameters import Reader
from .shifted_ranks import Ranks
from .shifted_sources import gathered

#: Layouts that are compared with the weights, and that are proven, before the search ends.
_MOST_LAYOUTS, _MOST_PROVEN = 256, 16
_BITS = {2: torch.int16, 4: torch.int32}


@dataclass
class Found:
    """What is known of a buffer.

    Args:
        buffer: Its parameters in order.
        in_place: Whether the stored master weights of all of them are their weights.
        layouts: The places of the parameters in every layout that the weights prove.
        wrong: Names of the parameters in whose places something else is stored, and number of these
            elements, in the layout that explains most. Only if none is proven.
    """

    buffer: Sequence[Held]
    in_place: bool
    layouts: list[tuple[Place, ...]] = field(default_factory=list)
    wrong: dict[str, int] = field(default_factory=dict)


def find(reader: Reader, buffer: Sequence[Held], ranks: Ranks) -> Found:
    """Find the layouts of a buffer that explain everything that is stored of it.

    Args:
        reader: Reads the checkpoint.
        buffer: The parameters of the buffer in its order.
        ranks: The ranks of the run.
    """
    parts, differing = [], {}
    for held in buffer:
        shift, count = None, 0
        if held.stored:
            stored, weights = _bits(reader.rounded(held)), _bits(reader.weights(held))
            count = int((stored != weights).sum())
            shift = shift_of(stored, weights)
        if count:
            differing[held.name] = count
        parts.append(Part(held.elements, shift, held.shared, held.stored))
    if not differing:
        return Found(buffer, True)
    found = Found(buffer, False, wrong=differing)
    tried = 0
    for tier in _tiers(parts, ranks):
        for places in itertools.islice(tier, _MOST_LAYOUTS):
            # The first layout, and later ones with less, tell what is wrong.
            most = None if tried == 0 else max(1, sum(found.wrong.values()))
            wrong = compare(reader, buffer, places, most)
            tried += 1
            if wrong is not None:
                found.wrong = wrong
            if wrong == {}:
                found.layouts.append(places)
            if len(found.layouts) == _MOST_PROVEN:
                break
        if found.layouts:
            break
    return found


def _tiers(parts: Sequence[Part], ranks: Ranks) -> Iterator[Iterator[tuple[Place, ...]]]:
    """List the layouts that may be, those of the run's own arguments first."""
    of_run = [d for size in ranks.data_parallel for d in divisors(size)]
    for candidates, whole in itertools.product((of_run, divisors(None)), (True, False)):
        yield _layouts(parts, candidates, whole)


def _layouts(
    parts: Sequence[Part], candidates: Sequence[int], whole: bool
) -> Iterator[tuple[Place, ...]]:
    seen = set()
    shared = any(part.shared for part in parts)
    for divisor, alone in itertools.product(candidates, (False, True) if shared else (False,)):
        for places in layouts(parts, divisor, shared=alone, whole=whole):
            if places not in seen:
                seen.add(places)
                yield places


def compare(
    reader: Reader, buffer: Sequence[Held], places: Sequence[Place], most: int | None
) -> dict[str, int] | None:
    """Compare everything that is stored of a buffer with what a layout has there.

    Args:
        reader: Reads the checkpoint.
        buffer: The parameters of the buffer in its order.
        places: Their places.
        most: Stop at this many elements that differ.

    Returns:
        Name -> number of stored elements that are not the parameter's weights; None if there are
        `most`.
    """
    wrong: Counter[str] = Counter()
    length = gathered(places)

    @functools.lru_cache(maxsize=4)
    def weights(number: int) -> torch.Tensor:
        return _bits(reader.weights(buffer[number]))

    first = 0
    for held, window in zip(buffer, places, strict=True):
        if not held.stored:
            continue
        while places[first].end - places[first].shift <= window.begin and first + 1 < len(places):
            first += 1
        stored = _bits(reader.rounded(held))
        end = min(window.end, length)
        explained = torch.zeros(len(stored), dtype=torch.bool)
        for number in range(first, len(places)):
            place = places[number]
            low, high = place.begin - place.shift, place.end - place.shift
            if low >= end:
                break
            begin, stop = max(low, window.begin), min(high, end)
            if begin >= stop:
                continue
            here = slice(begin - window.begin, stop - window.begin)
            differ = stored[here] != weights(number)[begin - low : stop - low]
            explained[here] = True
            if count := int(differ.sum()):
                wrong[buffer[number].name] += count
        # Between two parameters, and behind the last one, zeros are stored.
        if count := int((stored[~explained] != 0).sum()):
            wrong[held.name] += count
        if most is not None and sum(wrong.values()) >= most:
            return None
    return dict(wrong)


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(_BITS[values.itemsize])
