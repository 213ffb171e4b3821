"""Apply a parameter map to a load: request tensors from where they are stored.

A sharded state dict says for each tensor which key and which part of the checkpoint fill it. The
map changes only that, so that no data is moved: a copied layer is read where its source is stored.
What is new is not requested and keeps its initial value.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)

from ..checkpoint.names import OBJECT, Place, kind_and_key
from ..plan.mapped import Mapped
from .paths import Path, put_at, value_at, walk


@dataclass(frozen=True)
class Slot:
    """The entry that a load fills with the master weights or a moment of one parameter.

    Args:
        model_param: The model's parameter.
        state: ``param`` or the moment.
        container: The dict or list of the sharded state dict that holds the entry.
        key: Its key or position there.
    """

    model_param: torch.Tensor
    state: str
    container: Any
    key: Any

    @property
    def is_new(self) -> bool:
        """Whether the entry is not requested, by this map or by Megatron's own for other models."""
        return isinstance(self.container[self.key], LocalNonpersistentObject)


@dataclass
class Rewritten:
    """What has to be done to the result of a load with a map.

    Args:
        shapes: The path of each tensor that was requested with leading axes, and its shape.
        duplicates: The path of each tensor that another one on this rank is the same as, and the
            other's path.
        later: Tensors that need a request of their own, by path.
        merges: The path of each factory whose parts were requested, and the factory.
        lists: The path of each list that was requested as a dict, outer ones first.
    """

    shapes: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    duplicates: list[tuple[Path, Path]] = field(default_factory=list)
    later: dict[Path, Any] = field(default_factory=dict)
    merges: list[tuple[Path, Any]] = field(default_factory=list)
    lists: list[Path] = field(default_factory=list)

    def finish(self, state_dict: Any, load: Callable[[dict[str, Any]], Mapping[str, Any]]) -> None:
        """Complete the result of the load.

        Args:
            state_dict: The result. It is modified in place.
            load: Loads further sharded entries of the same checkpoint, without a collective.
        """
        waiting = self.later
        while waiting:
            now, waiting = _first_of_each_key(waiting)
            found = load({"later": {str(i): e for i, e in enumerate(now.values())}})["later"]
            for number, path in enumerate(now):
                put_at(state_dict, path, found[str(number)])
        for path, of in self.duplicates:
            value = value_at(state_dict, of)
            same = value.clone() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
            put_at(state_dict, path, same)
        for path, shape in self.shapes.items():
            put_at(state_dict, path, value_at(state_dict, path).view(shape))
        for path in reversed(self.lists):
            found = value_at(state_dict, path)
            put_at(state_dict, path, [found[i] for i in range(len(found))])
        for path, factory in self.merges:
            put_at(state_dict, path, factory.merge_fn(value_at(state_dict, path)))


def rewrite(state_dict: Any, mapped: Mapped) -> Rewritten:
    """Request tensors from their sources.

    Megatron takes it that the ranks together request every layer of a tensor with leading axes
    (core/dist_checkpointing/strategies/torch.py:161, 0.19.2). It does not if these axes are the
    tensor's own, as they are in what is requested here.

    Args:
        state_dict: This rank's sharded state dict. It is modified in place.
        mapped: The sources.
    """
    out = Rewritten()
    for path, entry in list(walk(state_dict)):
        if isinstance(entry, ShardedTensorFactory):
            _open_factory(state_dict, path, entry, mapped, out)
    for path, entry in list(walk(state_dict)):
        if isinstance(entry, ShardedTensor | ShardedObject):
            put_at(state_dict, path, _rewritten(entry, mapped, path, out))
    return out


def separate(state_dict: Any, out: Rewritten) -> None:
    """Take out what one request cannot contain: the same part of a tensor twice.

    Args:
        state_dict: The rewritten sharded state dict. It is modified in place.
        out: Receives what is taken out.
    """
    first: dict[tuple[Any, ...], tuple[Path, Any]] = {}
    for path, entry in list(walk(state_dict)):
        if not isinstance(entry, ShardedTensor | ShardedObject):
            continue
        shape = getattr(entry, "local_shape", None)
        known, of_known = first.setdefault((entry.key, entry.global_offset), (path, shape))
        if known == path:
            continue
        if shape == of_known:
            out.duplicates.append((path, known))
        else:
            out.later[path] = entry
        put_at(state_dict, path, LocalNonpersistentObject(None))
    for path, value in list(_lists(state_dict)):
        # Only lists of equal length can be merged (core/dist_checkpointing/dict_utils.py:228).
        if any(isinstance(e, LocalNonpersistentObject) for _, e in walk(value)):
            out.lists.append(path)
            put_at(state_dict, path, dict(enumerate(value)))


def _open_factory(
    state_dict: Any, path: Path, factory: Any, mapped: Mapped, out: Rewritten
) -> None:
    """Put a factory's parts in its place, so that each can be requested from elsewhere."""
    built = factory.build()
    sources = [_source(part, mapped) for _, part in walk({"": built})]
    if any(found and place is None for found, place in sources):
        put_at(state_dict, path, LocalNonpersistentObject(factory.data))
    else:
        put_at(state_dict, path, built)
        out.merges.append((path, factory))


def _source(entry: Any, mapped: Mapped) -> tuple[bool, Place | None]:
    """Whether an entry has another source than its own place, and which."""
    if isinstance(entry, ShardedObject):
        key = (OBJECT, entry.key, tuple(entry.global_offset))
    else:
        split = kind_and_key(entry.key)
        if split is None:
            return False, None
        key = (split[0], entry.key, tuple(entry.global_offset[: entry.prepend_axis_num]))
    return key in mapped.sources, mapped.sources.get(key)


def _rewritten(entry: Any, mapped: Mapped, path: Path, out: Rewritten) -> Any:
    found, place = _source(entry, mapped)
    if found and place is None:
        return LocalNonpersistentObject(entry.data)
    if isinstance(entry, ShardedObject):
        if place is None:
            return entry
        return replace(entry, key=place.key, global_shape=place.axes, global_offset=place.lead)
    own = entry.prepend_axis_num
    if place is None:
        if not own:
            return entry
        place = Place(entry.key, entry.global_offset[:own], entry.global_shape[:own], ())
    shape, ones = tuple(entry.local_shape), (1,) * len(place.axes)
    out.shapes[path] = shape
    return replace(
        entry,
        key=place.key,
        data=None if entry.data is None else entry.data.view(*ones, *shape),
        local_shape=(*ones, *shape),
        global_shape=(*place.axes, *entry.global_shape[own:]),
        global_offset=(*place.lead, *entry.global_offset[own:]),
        axis_fragmentations=(*place.axes, *entry.axis_fragmentations[own:]),
        prepend_axis_num=0,
    )


def _first_of_each_key(waiting: dict[Path, Any]) -> tuple[dict[Path, Any], dict[Path, Any]]:
    keys: set[str] = set()
    now: dict[Path, Any] = {}
    for path, entry in waiting.items():
        if entry.key not in keys:
            keys.add(entry.key)
            now[path] = entry
    return now, {path: entry for path, entry in waiting.items() if path not in now}


def _lists(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every list, outer ones first."""
    if isinstance(value, list):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list):
            yield from _lists(inner, (*path, key))
