"""Wrap what says how a sharded state dict is made: at a save, and of a checkpoint."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from ..base import ranks
from ..resume import saving
from ..resume.session import current

_SHARDING = "distrib_optim_sharding_type"
_NUMBER = re.compile(r"(?<![^.])layers\.\d+\.")


def content_metadata(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `dist_checkpointing.load_content_metadata`.

    A checkpoint that was written without the distributed optimizer names no sharding type, for
    which Megatron assumes one that it cannot read (core/optimizer/distrib_optimizer.py:1509,
    0.19.2). What it stores is what ``fully_reshardable`` stores.
    """

    @functools.wraps(original)
    def load_content_metadata(*args: Any, **kwargs: Any) -> Any:
        metadata = original(*args, **kwargs)
        load = current.load
        if metadata is None or load is None or _SHARDING in metadata:
            return metadata
        distributed = any(hasattr(m, "model_param_gbuf_map") for m in load.resume.members)
        return {**metadata, _SHARDING: "fully_reshardable"} if distributed else metadata

    return load_content_metadata


def save_metadata(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_build_sharded_state_dict_metadata`, which a save calls.

    Layers of one kind are stored as one tensor, and Megatron refuses to save its optimizer state if
    some of the layers are frozen ("Invalid access pattern"). Layers can be stored separately.

    Rank 0 stores the param_groups for all ranks. If its pipeline stage trains nothing, it has never
    counted a step, and gets the others'.
    """

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        metadata = original(*args, **kwargs)
        by_bucket = metadata.get(_SHARDING) == "dp_reshardable"
        if current.member is not None and not by_bucket:
            members = current.member.resume.members
            mine, step = _layers(current.member.resume_chunks), saving.step_of_rank(members)
            frozen, step = ranks.largest([sum(not trained for _, trained in mine), step])
            saving.set_step(members, step)
            if frozen and _some_are_frozen(mine):
                metadata["non_homogeneous_layers"] = True
        return metadata

    return build


def _layers(chunks: Sequence[Any]) -> set[tuple[str, bool]]:
    """List the parameters of this rank's layers without the layers' numbers: name, trained."""
    return {
        (_NUMBER.sub("layers.", name, count=1), parameter.requires_grad)
        for chunk in chunks
        for name, parameter in chunk.named_parameters()
        if _NUMBER.search(name)
    }


def _some_are_frozen(mine: set[tuple[str, bool]]) -> bool:
    """Whether a parameter is frozen in some layers and not in others; collective."""
    everyone = {one for of_rank in ranks.gather(sorted(mine)) for one in of_rank}
    return len({name for name, _ in everyone}) < len(everyone)
