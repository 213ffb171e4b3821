"""Check the entries of torch's index once, so that whoever reads them can trust them."""

from __future__ import annotations

import math
from typing import Any

import torch

from .bounded import Unbounded, is_shape, require_bounded
from .placeholders import Placeholder
from .state_keys import state_dtype

#: More elements than any tensor can have.
_ELEMENTS = 1 << 60
#: More bytes than any file can have.
_BYTES = 1 << 62


def bad_entry(index: Any) -> str | None:
    """Find an entry that is not as torch writes it.

    Args:
        index: torch's Metadata, as a `Placeholder` with both dicts.

    Returns:
        What is wrong, and where; None if nothing is.
    """
    bounded: set[torch.Size] = set()  # most tensors have the shape of another
    for key, entry in index.state_dict_metadata.items():
        if type(key) is not str:
            return f"a key that is a {type(key).__name__}"
        if not isinstance(entry, Placeholder):
            return f"a {type(entry).__name__} for {key}"
        if "size" in entry.__dict__ and (why := _bad_tensor(entry, bounded)):
            return f"{why} for {key}"
    for place, info in index.storage_data.items():
        if why := _bad_place(place, info):
            return f"{why} for {getattr(place, 'fqn', place)}"
    return None


def _bad_tensor(entry: Any, bounded: set[torch.Size]) -> str | None:
    size = entry.size
    if type(size) is not torch.Size:
        return "no shape"
    if size not in bounded:
        if not is_shape(size) or math.prod(size) >= _ELEMENTS:
            return "no shape"
        bounded.add(size)
    try:
        if type(state_dtype(entry)) is not torch.dtype:
            return "no dtype"
        for chunk in entry.chunks:
            offsets, sizes = chunk.offsets, chunk.sizes
            if type(offsets) is not torch.Size or type(sizes) is not torch.Size:
                return "a piece without a shape"
            if not len(size) == len(offsets) == len(sizes):
                return "a piece with other dimensions"
            for end, begin, length in zip(size, offsets, sizes, strict=True):
                if not 0 <= begin <= begin + length <= end:
                    return "a piece that is not inside"
    except (AttributeError, IndexError, KeyError, TypeError):
        return "no tensor"
    return None


def _bad_place(place: Any, info: Any) -> str | None:
    try:
        found = info.__dict__
        offset, length = found["offset"], found["length"]
        if type(place.fqn) is not str:
            return "no name"
        if place.offset is not None and type(place.offset) is not torch.Size:
            return "no offset in the tensor"
        if type(found["relative_path"]) is not str:
            return "no file"
        if not (type(offset) is type(length) is int and 0 <= offset < _BYTES > length >= 0):
            return "no place in a file"
        if "transform_descriptors" in found:
            require_bounded(found["transform_descriptors"])
    except (AttributeError, KeyError, TypeError):
        return "no place"
    except Unbounded as e:
        return str(e)
    return None
