"""Compare the index of a torch_dist checkpoint with the files, and its pieces with its tensors."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

#: torch's index of a distributed checkpoint (torch/distributed/checkpoint/filesystem.py).
INDEX = ".metadata"


class Problem(NamedTuple):
    """A file that does not fit the index, or an index that does not fit itself.

    Args:
        file: Name of the file.
        expected: What should be there.
        found: What is there.
    """

    file: str
    expected: str
    found: str


def problems(directory: Path, index: Any) -> Iterator[Problem]:
    """Find what makes a load fail, or leaves elements of a tensor unread.

    torch's reader copies the pieces that the index names, and does not notice if some are missing.

    Args:
        directory: Directory of the iteration.
        index: Metadata of torch, as a `Placeholder`.
    """
    yield from _short_files(directory, index)
    places: dict[str, set[Any]] = defaultdict(set)
    for item in index.storage_data:
        places[item.fqn].add(item.offset or ())
    for key, entry in index.state_dict_metadata.items():
        if problem := _problem_of(key, entry, places.get(key, set())):
            yield Problem(INDEX, *problem)


def more_problems(index: Any) -> Iterator[Problem]:
    """Find what does not disturb a load, but that Megatron does not write."""
    for key in {item.fqn for item in index.storage_data} - {*index.state_dict_metadata}:
        yield Problem(INDEX, "places of tensors and objects", f"one for {key}, which is neither")
    by_file: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for item, info in index.storage_data.items():
        by_file[info.relative_path].append((info.offset, info.offset + info.length, item.fqn))
    for name, items in by_file.items():
        items.sort()
        for (_, end, before), (begin, _, after) in itertools.pairwise(items):
            if begin < end:
                said = f"{before} and {after}, which share bytes of {name}"
                yield Problem(INDEX, "items with bytes of their own", said)


def _short_files(directory: Path, index: Any) -> Iterator[Problem]:
    ends: dict[str, int] = {}
    for info in index.storage_data.values():
        end = info.offset + info.length
        if end > ends.get(info.relative_path, 0):
            ends[info.relative_path] = end
    for name, end in sorted(ends.items()):
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found is None or found < end:
            size = "no file" if found is None else f"{found} bytes"
            yield Problem(name, f"at least {end} bytes, as {INDEX} says", size)


def _problem_of(key: str, entry: Any, places: set[Any]) -> tuple[str, str] | None:
    """Return what is expected and found, if a tensor's pieces do not fill it."""
    if not hasattr(entry, "size"):
        return None if places else (f"a place for the object {key}", "none")
    shape, filled = tuple(entry.size), 0
    for chunk in entry.chunks:
        if chunk.offsets not in places:
            return f"a place for the piece of {key} at {tuple(chunk.offsets)}", "none"
        filled += math.prod(chunk.sizes)
    if filled != math.prod(shape):
        return f"pieces of {key} that fill {shape}", f"{filled} of {math.prod(shape)} elements"
    return None
