"""Skip reading moments that a policy overwrites regardless of their old values.

`mark_unread` marks them in a sharded state dict before the load fills it. Around
``dist_checkpointing.load`` (`megatron_ext.hooks.sharded`) `remove_marked` removes the marked
entries from the request. `RemovedEntries.fill_with_zeros` then gives the stock loader zeros in
their place, so that no later code reads uninitialised memory. For bf16 weights with fp32 master
weights stock reads 14 bytes per parameter, and exp_avg and exp_avg_sq are 4 of them each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..host.optimizers import state_of
from ..plan.matching import overwritten
from ..plan.parameters import Parameter
from ..rules.form import MOMENTS, Key
from .parameters import held_parameters, locate_parameters
from .paths import value_at, walk
from .steps import is_hybrid

#: Attribute of a marked entry. The copies that Megatron makes for other ranks do not have it.
_MARK = "megatron_ext_overwritten"


@dataclass(frozen=True)
class _Unread:
    """The mark of an entry that is not read.

    Args:
        name: Global name of its parameter; empty for padding between parameters.
        key: The moment.
        shared: Whether the stock loader copies the tensor that it is given, so that an expanded
            tensor of one element is enough. Otherwise it keeps the tensor itself.
    """

    name: str
    key: Key
    shared: bool


@dataclass
class RemovedEntries:
    """Entries that were removed from a sharded state dict.

    Args:
        entries: The path of each entry, and the entry.
    """

    entries: list[tuple[tuple[Any, ...], Any]] = field(default_factory=list)

    @property
    def names(self) -> dict[Key, frozenset[str]]:
        """The global names of this rank's parameters whose moment was not read, by moment."""
        marks = [getattr(entry, _MARK) for _, entry in self.entries]
        return {key: frozenset(m.name for m in marks if m.key == key and m.name) for key in MOMENTS}

    def fill_with_zeros(self, state_dict: Any) -> None:
        """Put zeros where the entries were, for the stock loader.

        Args:
            state_dict: The result of ``dist_checkpointing.load``. It is modified in place.
        """
        for path, entry in self.entries:
            found = state_dict
            for step in path[:-1]:
                # The load drops a dict whose entries were all removed.
                found = found.setdefault(step, {}) if isinstance(found, dict) else found[step]
            data = entry.data
            zero = torch.zeros((), dtype=data.dtype, device=data.device)
            shared = getattr(entry, _MARK).shared
            found[path[-1]] = zero.expand(data.shape) if shared else torch.zeros_like(data)


def mark_unread(optimizer: Any, state_dict: Mapping[str, Any], model_chunks: Sequence[Any]) -> None:
    """Mark the moments that an optimizer's policy overwrites regardless of their old values.

    Not collective. Only whole tensors of a parameter are marked. Sharding types that store all
    moments in one object (``dp_zero_gather_scatter``) have no entry to mark.

    Args:
        optimizer: An optimizer of this package.
        state_dict: Its sharded state dict for a load. The entries are marked in place.
        model_chunks: The model it was built for.
    """
    inner, policy = optimizer.optimizer, optimizer.resume.policy
    if not policy.overwrites_moments or inner is None or is_hybrid(inner):
        return
    state = state_of(inner)
    tensors = {key: found for key in MOMENTS if (found := state.tensor(key)) is not None}
    names = locate_parameters(model_chunks)
    groups = _groups(optimizer)
    for model_param, entries, shared in entries_of(optimizer, state_dict):
        name, chosen = "", frozenset(tensors)
        if model_param is not None:
            if id(model_param) not in names:
                continue
            name, shape, _ = names[id(model_param)]
            group = groups.get(id(model_param))
            chosen = overwritten(policy, Parameter(name, shape, 0), group, state)
        for key in chosen & tensors.keys():
            entry = entries.get(tensors[key])
            if isinstance(getattr(entry, "data", None), torch.Tensor):
                setattr(entry, _MARK, _Unread(name, key, shared))


def remove_marked(state_dict: Any, *, whole: bool) -> RemovedEntries:
    """Remove the marked entries from a sharded state dict.

    Args:
        state_dict: The sharded state dict. It is modified in place.
        whole: Whether to remove only tensors whose parts are all marked. A single rank cannot
            request a part of a stored tensor, such as one layer of many: Megatron assumes that
            another rank requests the rest (core/dist_checkpointing/strategies/torch.py, placement
            of shards in sharded_tensor_to_torch_sharded_tensor, 0.19.2).
    """
    entries = list(walk(state_dict))
    found = [(path, e) for path, e in entries if hasattr(e, _MARK)]
    if whole:
        asked = {e.key for _, e in entries if hasattr(e, "key") and not hasattr(e, _MARK)}
        found = [(path, e) for path, e in found if e.key not in asked]
    for path, _ in found:
        del value_at(state_dict, path[:-1])[path[-1]]
    return RemovedEntries(found)


def _groups(optimizer: Any) -> dict[int, Mapping[str, Any]]:
    """Map the id of each model parameter that this rank holds to its param_group."""
    groups = optimizer.optimizer.param_groups
    return {id(h.model_param): groups[h.group] for h in held_parameters(optimizer)}


def entries_of(
    optimizer: Any, state_dict: Mapping[str, Any]
) -> Iterator[tuple[Any, dict[str, Any], bool]]:
    """Yield each model parameter, its entries, and whether the loader copies from them.

    A parameter of None is bucket padding; it gets the moments marked for every parameter of that
    bucket.
    """
    if "param_state" in state_dict:
        walk = _WALKS.get(state_dict.get("param_state_sharding_type", ""))
        if walk is not None:
            for model_param, entries in walk(optimizer, state_dict["param_state"]):
                yield model_param, entries, True
        return
    section = state_dict.get("optimizer", state_dict)
    by_id = section.get("state", {}) if isinstance(section, Mapping) else {}
    for number, held in enumerate(held_parameters(optimizer)):
        of_param = by_id.get(number)
        if isinstance(of_param, dict):
            yield held.model_param, of_param, False


def _of_buckets(optimizer: Any, state: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield dp_reshardable's entries: buckets with padding (distrib_optimizer.py:1828, 0.19.2)."""
    for number, of_buffer in enumerate(optimizer.gbuf_ranges):
        for dtype, buckets in of_buffer.items():
            for bucket, ranges in enumerate(buckets):
                stored = state[number][dtype][bucket]
                real = [e for e in stored if not e["padding"].obj]
                yield from zip(ranges["param_map"], real, strict=True)
                tensors = state_of(optimizer.optimizer).tensors
                keys = [k for k in tensors if all(hasattr(e.get(k), _MARK) for e in real)]
                yield from ((None, {k: e[k] for k in keys}) for e in stored if e["padding"].obj)


def _of_model(optimizer: Any, state: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield fully_reshardable's entries: whole parameters by buffer (distrib_optimizer.py:1690)."""
    params = [p for buffer in optimizer.buffers for p in buffer.param_index_map]
    yield from ((p, state[number]) for number, p in enumerate(params))


def _of_shards(optimizer: Any, state: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield fully_sharded_model_space's entries by shard (distrib_optimizer.py:1978)."""
    params = [
        p
        for of_buffer in optimizer.gbuf_ranges
        for buckets in of_buffer.values()
        for ranges in buckets
        for p in ranges["param_map"]
    ]
    yield from ((p, state[number]) for number, p in enumerate(params))


_WALKS = {
    "dp_reshardable": _of_buckets,
    "fully_sharded_bucket_space": _of_buckets,
    "fully_reshardable": _of_model,
    "fully_sharded_model_space": _of_shards,
}
