"""Apply the policy's parameter map to a `dist_checkpointing.load` that fills an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..plan.mapped import NewParameter
from ..policy.parameter_map import NO_MAP
from ..resume import parameter_map, requests
from ..resume.parameters import locate_parameters
from ..resume.session import Load


def rewrite_request(
    load: Load,
    call: dict[str, Any],
    stored: Mapping[str, tuple[int, ...] | None],
    begins: Callable[[], bool],
) -> parameter_map.Rewritten | None:
    """Decide the sources of all parameters and request them; collective.

    Args:
        load: The current load.
        call: The arguments of ``dist_checkpointing.load``. They are modified in place.
        stored: Checkpoint key -> shape; empty if the index cannot be read.
        begins: Whether the phase begins with this load; collective.

    Returns:
        What is to be done to the result; None if Megatron's request stays as it is.

    Raises:
        CheckpointError: See `megatron_ext.plan.parameter_map.plan_map`; on every rank.
    """
    resume = load.resume
    asked = resume.policy.parameters
    if asked and not begins():
        asked = NO_MAP
    chunks = [chunk for member in resume.members for chunk in member.resume_chunks]
    mapped = requests.plan_for(
        asked,
        call["sharded_state_dict"],
        stored,
        chunks,
        _fresh(load, chunks),
        rules=resume.policy.rules,
        strict=resume.policy.strict,
    )
    load.mapped = mapped
    rewritten = None
    if mapped.changes_request:
        rewritten = parameter_map.rewrite(call["sharded_state_dict"], mapped)
        # Megatron's check counts the layers that it would request.
        call["validate_access_integrity"] = False
    new: dict[str, set[int]] = {}
    for slot in load.slots:
        if slot.is_new:
            new.setdefault(slot.state, set()).add(id(slot.model_param))
    load.new = {state: frozenset(ids) for state, ids in new.items()}
    load.slots.clear()
    return rewritten


def _fresh(load: Load, chunks: list[Any]) -> list[NewParameter]:
    """List the parameters that Megatron itself does not request.

    A GPT checkpoint that goes on as a HybridModel lacks the layers of other kinds
    (training/checkpointing.py:1986, 0.19.2).
    """
    ids = {id(slot.model_param) for slot in load.slots if slot.is_new}
    if not ids:
        return []
    found = ((name, shape) for i, (name, shape, _) in locate_parameters(chunks).items() if i in ids)
    return [NewParameter(name, math.prod(shape), True, True) for name, shape in found]
