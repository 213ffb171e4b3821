"""Moments that a policy overwrites without looking at them are not read from the checkpoint.

`mark_unread` marks them in a sharded state dict that is about to be filled. Around
``dist_checkpointing.load`` (`megatron_ext.hooks.sharded`) `leave_out` takes the marked entries out
of what is requested, and `LeftOut.put_back` gives the stock loader zeros in their place, so that
nothing downstream meets uninitialised memory. A moment that is reset is 8 of the 14 bytes a
parameter that stock reads for bf16 weights with fp32 master weights: exp_avg and exp_avg_sq are 4
each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..plan.matching import overwritten
from ..plan.parameters import Parameter
from ..rules.form import Key
from .parameters import held_by, located
from .steps import is_adam, is_hybrid
from .vocabulary import walk

#: Attribute of a marked entry; an entry that Megatron copies for other ranks does not carry it.
_TAG = "megatron_ext_overwritten"

_KEYS: tuple[Key, ...] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Tag:
    """What is known of a marked entry.

    Args:
        name: Global name of its parameter; empty for padding between parameters.
        key: Which moment.
        shared: Whether the stock loader copies from what it is given, so that a tensor of one
            element will do; else it keeps it.
    """

    name: str
    key: Key
    shared: bool


@dataclass
class LeftOut:
    """Entries that were taken out of a sharded state dict.

    Args:
        entries: Where each was, and the entry.
    """

    entries: list[tuple[tuple[Any, ...], Any]] = field(default_factory=list)

    @property
    def names(self) -> dict[Key, frozenset[str]]:
        """For each moment the global names of the parameters it was not read of, on this rank."""
        tags = [getattr(entry, _TAG) for _, entry in self.entries]
        return {key: frozenset(t.name for t in tags if t.key == key and t.name) for key in _KEYS}

    def put_back(self, state_dict: Any) -> None:
        """Give the stock loader zeros where the entries were.

        Args:
            state_dict: What ``dist_checkpointing.load`` returned; filled in place.
        """
        for path, entry in self.entries:
            found = state_dict
            for step in path[:-1]:
                # A dict whose entries were all taken out is gone.
                found = found.setdefault(step, {}) if isinstance(found, dict) else found[step]
            data = entry.data
            zero = torch.zeros((), dtype=data.dtype, device=data.device)
            shared = getattr(entry, _TAG).shared
            found[path[-1]] = zero.expand(data.shape) if shared else torch.zeros_like(data)


def mark_unread(optimizer: Any, state_dict: Mapping[str, Any], model_chunks: Sequence[Any]) -> None:
    """Mark the moments that an optimizer's policy overwrites whatever they are.

    Not collective. Only whole tensors of a parameter are marked; of sharding types that store them
    in one object (``dp_zero_gather_scatter``) none.

    Args:
        optimizer: One of this package's.
        state_dict: Its sharded state dict for a load; entries are marked in place.
        model_chunks: The model it was built for.
    """
    inner, policy = optimizer.optimizer, optimizer.resume.policy
    if not policy.overwrites_moments or inner is None or not is_adam(inner) or is_hybrid(inner):
        return
    names = located(model_chunks)
    groups = _groups(optimizer)
    for model_param, entries, shared in _parameters(optimizer, state_dict):
        name, chosen = "", frozenset(_KEYS)
        if model_param is not None:
            if id(model_param) not in names:
                continue
            name, shape, _ = names[id(model_param)]
            chosen = overwritten(policy, Parameter(name, shape, 0), groups.get(id(model_param)))
        for key in chosen:
            if isinstance(getattr(entries.get(key), "data", None), torch.Tensor):
                setattr(entries[key], _TAG, Tag(name, key, shared))


def leave_out(state_dict: Any, *, whole: bool) -> LeftOut:
    """Take the marked entries out of a sharded state dict.

    Args:
        state_dict: Changed in place.
        whole: Only tensors of the checkpoint of which all is marked. On a single rank Megatron
            cannot ask for a part of a tensor such as one layer of many: what is not asked for it
            takes for another rank's (core/dist_checkpointing/strategies/torch.py, placement of
            shards in sharded_tensor_to_torch_sharded_tensor, 0.19.2).
    """
    entries = list(walk(state_dict))
    found = [(path, e) for path, e in entries if hasattr(e, _TAG)]
    if whole:
        asked = {e.key for _, e in entries if hasattr(e, "key") and not hasattr(e, _TAG)}
        found = [(path, e) for path, e in found if e.key not in asked]
    for path, _ in found:
        container = state_dict
        for step in path[:-1]:
            container = container[step]
        del container[path[-1]]
    return LeftOut(found)


def _groups(optimizer: Any) -> dict[int, Mapping[str, Any]]:
    """Id of a model parameter that this rank holds -> its param_group."""
    groups = optimizer.optimizer.param_groups
    return {id(h.model_param): groups[h.group] for h in held_by(optimizer)}


def _parameters(
    optimizer: Any, state_dict: Mapping[str, Any]
) -> Iterator[tuple[Any, dict[str, Any], bool]]:
    """Model parameter, its entries, and whether the loader copies from them.

    None stands for padding in a bucket, with the moments that all its parameters are marked of.
    """
    if "param_state" in state_dict:
        walk = _WALKS.get(state_dict.get("param_state_sharding_type", ""))
        if walk is not None:
            for model_param, entries in walk(optimizer, state_dict["param_state"]):
                yield model_param, entries, True
        return
    section = state_dict.get("optimizer", state_dict)
    by_id = section.get("state", {}) if isinstance(section, Mapping) else {}
    for number, held in enumerate(held_by(optimizer)):
        of_param = by_id.get(number)
        if isinstance(of_param, dict):
            yield held.model_param, of_param, False


def _of_buckets(optimizer: Any, state: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """dp_reshardable: by buckets, with padding in between (distrib_optimizer.py:1828, 0.19.2)."""
    for number, of_buffer in enumerate(optimizer.gbuf_ranges):
        for dtype, buckets in of_buffer.items():
            for bucket, ranges in enumerate(buckets):
                stored = state[number][dtype][bucket]
                real = [e for e in stored if not e["padding"].obj]
                yield from zip(ranges["param_map"], real, strict=True)
                marked: list[str] = [k for k in _KEYS if all(hasattr(e.get(k), _TAG) for e in real)]
                yield from ((None, {k: e[k] for k in marked}) for e in stored if e["padding"].obj)


def _of_model(optimizer: Any, state: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """fully_reshardable: all parameters of each buffer, whole (distrib_optimizer.py:1690)."""
    params = [p for buffer in optimizer.buffers for p in buffer.param_index_map]
    yield from ((p, state[number]) for number, p in enumerate(params))


def _of_shards(optimizer: Any, state: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """fully_sharded_model_space: this rank's shards (distrib_optimizer.py:1978)."""
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
