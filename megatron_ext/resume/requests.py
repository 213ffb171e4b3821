"""List what the ranks request from a checkpoint, and decide where each tensor comes from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)

from ..base import ranks
from ..checkpoint.names import OBJECT, Style, kind_and_key
from ..checkpoint.state_keys import parse_state_key
from ..host.optimizers import FIRST
from ..plan.mapped import Mapped, NewParameter, Wanted
from ..plan.parameter_map import plan_map
from ..policy.match import MomentRule
from ..policy.parameter_map import ParameterMap
from .paths import walk

#: A grouped weight or bias of TE's experts, with the expert's number.
_GROUPED = re.compile(r"\.experts\.linear_fc\d\.(?:weight|bias)\d+$")


def plan_for(
    asked: ParameterMap,
    state_dict: Any,
    stored: Mapping[str, tuple[int, ...] | None],
    chunks: Sequence[Any],
    fresh: Sequence[NewParameter] = (),
    *,
    rules: Sequence[MomentRule],
    strict: bool,
) -> Mapped:
    """Decide the sources of all tensors; collective over the default group.

    One all_reduce of 24 bytes tells whether every rank finds what it requests, and whether nothing
    is left over or new. Only if not, or if a map is asked, the ranks exchange their requests.

    Args:
        asked: What the user says.
        state_dict: This rank's sharded state dict.
        stored: Checkpoint key -> shape; None for an object. Empty if it cannot be read.
        chunks: The model on this rank, for the style of its names.
        fresh: The parameters on this rank that Megatron itself does not request.
        rules: The policy's rules for moments.
        strict: Whether a pattern that matches nothing is an error.

    Raises:
        CheckpointError: See `megatron_ext.plan.parameter_map.plan_map`; on every rank.
    """
    entries = list(_tensors(state_dict))
    mains = (e for e in entries if _first_moment(e.key) and is_main_replica(e.replica_id))
    elements = sum(math.prod(e.local_shape) for e in mains)
    known = bool(stored) and all(_is_there(e, stored) for e in entries)
    requested, problems, more = ranks.total([elements, int(not known), len(fresh)])
    moments = sum(math.prod(s) for key, s in stored.items() if s is not None and _first_moment(key))
    if not problems and requested == moments and not asked and not more:
        return Mapped()
    mine = (list(_wanted(state_dict)), _style(chunks), list(fresh)) if stored else None
    everyone = ranks.gather(mine)
    if None in everyone:
        return Mapped()  # the load itself fails on that rank
    style = Style(any(s.local for _, s, _ in everyone), any(s.grouped for _, s, _ in everyone))
    wanted = _merged(one for found, _, _ in everyone for one in found)
    mapped = plan_map(asked, wanted, stored, style, rules=rules, strict=strict)
    new = {*mapped.new, *(one for _, _, found in everyone for one in found)}
    return replace(mapped, new=tuple(sorted(new)))


def _wanted(state_dict: Any) -> Iterator[Wanted]:
    """Yield the requests of this rank; the other replicas of a shard request the same."""
    for _, entry in walk(state_dict):
        if not is_main_replica(getattr(entry, "replica_id", 1)):
            continue
        if isinstance(entry, ShardedObject) and entry.key.endswith("_extra_state"):
            lead, axes = tuple(entry.global_offset), tuple(entry.global_shape)
            yield Wanted(OBJECT, entry.key, entry.key, "", axes, (), False, (lead,))
        for base, part in _parts(entry):
            split, of_base = kind_and_key(part.key), kind_and_key(base)
            if split is None or of_base is None:
                continue
            own = part.prepend_axis_num
            key = of_base[1] if split[1].startswith(of_base[1]) else split[1]
            yield Wanted(
                split[0],
                part.key,
                key,
                split[1][len(key) :],
                tuple(part.global_shape[:own]),
                tuple(part.global_shape[own:]),
                bool(part.allow_shape_mismatch),
                (tuple(part.global_offset[:own]),),
            )


def _parts(entry: Any) -> Iterator[tuple[str, Any]]:
    """Yield the key of a parameter's entry with each of its tensors."""
    if isinstance(entry, ShardedTensorFactory):
        yield from ((entry.key, part) for _, part in walk({"": entry.build()}))
    elif isinstance(entry, ShardedTensor):
        yield entry.key, entry


def _tensors(state_dict: Any) -> Iterator[Any]:
    for _, entry in walk(state_dict):
        yield from (part for _, part in _parts(entry))


def _merged(found: Iterator[Wanted]) -> list[Wanted]:
    """Join the positions of requests that are the same otherwise."""
    leads: dict[Wanted, set[tuple[int, ...]]] = {}
    for one in found:
        leads.setdefault(replace(one, leads=()), set()).update(one.leads)
    return [replace(one, leads=tuple(sorted(places))) for one, places in leads.items()]


def _is_there(entry: Any, stored: Mapping[str, tuple[int, ...] | None]) -> bool:
    """Whether a checkpoint has what an entry requests, in that shape."""
    if kind_and_key(entry.key) is None:
        return True
    shape, own = stored.get(entry.key), entry.prepend_axis_num
    if shape is None:
        return False
    if entry.allow_shape_mismatch:
        return shape[:own] == tuple(entry.global_shape[:own])
    return shape == tuple(entry.global_shape)


def _first_moment(key: str) -> bool:
    state = parse_state_key(key)
    return state is not None and not state.bucket and state.state in FIRST


def _style(chunks: Sequence[Any]) -> Style:
    named = [name for chunk in chunks for name, _ in chunk.named_parameters()]
    return Style(
        any("input_layernorm." in name for name in named),
        any(_GROUPED.search(name) for name in named),
    )
