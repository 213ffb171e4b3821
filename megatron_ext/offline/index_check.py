"""Compare the index of a torch_dist checkpoint with itself and with the files. Reads no tensor."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ..checkpoint.store import INDEX, Store


def problems(store: Store) -> Iterator[tuple[str, str]]:
    """Yield the name of each file and the problem with it.

    Args:
        store: The files of the checkpoint.
    """
    for path, found, end in store.short_files():
        size = "no file" if found is None else f"{found} bytes"
        yield path.name, f"expected at least {end} bytes, as {INDEX} says, found {size}"
    yield from ((INDEX, problem) for problem in _places(store.index))
    yield from ((INDEX, problem) for problem in _overlaps(store.index))


def _places(index: Any) -> Iterator[str]:
    """Compare the pieces of each tensor with its shape and with the places in files."""
    places: dict[str, set[Any]] = defaultdict(set)
    for item in index.storage_data:
        places[item.fqn].add(tuple(item.offset or ()))
    for key, entry in index.state_dict_metadata.items():
        here = places.pop(key, set())
        if not hasattr(entry, "size"):
            if not here:
                yield f"no place for the object {key}"
            continue
        shape, chunks = tuple(entry.size), entry.chunks
        offsets = {tuple(c.offsets) for c in chunks}
        if offsets - here:
            yield f"no place for the piece of {key} at {sorted(offsets - here)[0]}"
        if any(not _inside(c, shape) for c in chunks):
            yield f"a piece of {key} lies outside of its shape {shape}"
        elif sum(math.prod(c.sizes) for c in chunks) != math.prod(shape):
            yield f"the pieces of {key} do not fill its shape {shape}"
    for key in places:
        yield f"a place for {key}, which is no tensor or object of the index"


def _inside(chunk: Any, shape: tuple[int, ...]) -> bool:
    return len(chunk.offsets) == len(chunk.sizes) == len(shape) and all(
        at >= 0 and size >= 0 and at + size <= whole
        for at, size, whole in zip(chunk.offsets, chunk.sizes, shape, strict=True)
    )


def _overlaps(index: Any) -> Iterator[str]:
    """Find items that share bytes of a file."""
    by_file: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for item, info in index.storage_data.items():
        by_file[info.relative_path].append((info.offset, info.offset + info.length, item.fqn))
    for name, items in by_file.items():
        items.sort()
        for (_, end, before), (begin, _, after) in itertools.pairwise(items):
            if begin < end:
                yield f"{before} and {after} share bytes of {name}"
