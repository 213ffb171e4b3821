"""Parse the checkpoint keys of an optimizer's tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

#: A tensor of an optimizer's state: by parameter ("optimizer.state.exp_avg.NAME") or by bucket
#: ("optimizer.distributed.dp_group_idx_0. ... .bucket_idx_0.exp_avg"), in a chain with its number
#: (core/optimizer/distrib_optimizer.py, 0.19.2).
_STATE_KEY = re.compile(
    r"(?:chained_(?P<number>\d+)\.)?optimizer\."
    r"(?:state\.(?P<state>[^.]+)\.(?P<parameter>.+)"
    r"|distributed\.(?P<bucket>.+)\.(?P<bucket_state>[^.]+))",
    re.DOTALL,
)


@dataclass(frozen=True)
class StateKey:
    """The parsed checkpoint key of a tensor of an optimizer's state.

    Args:
        optimizer: The optimizer's number in the chain; None if the key does not hold it.
        state: ``exp_avg``, ``exp_avg_sq``, ``param`` and so on.
        name: Name of the parameter or of the bucket.
        bucket: Whether `name` is a bucket's.
    """

    optimizer: int | None
    state: str
    name: str
    bucket: bool


def parse_state_key(key: str) -> StateKey | None:
    """Parse a checkpoint key.

    Args:
        key: A key of the store.

    Returns:
        The parts, or None if the key is not of a tensor of an optimizer's state.
    """
    found = _STATE_KEY.fullmatch(key)
    if found is None:
        return None
    number = None if found["number"] is None else int(found["number"])
    if found["state"] is not None:
        return StateKey(number, found["state"], found["parameter"], False)
    return StateKey(number, found["bucket_state"], found["bucket"], True)


def state_dtype(entry: Any) -> Any:
    """Return the torch dtype of a tensor's entry in the index (a `Placeholder`)."""
    properties = entry.properties
    state = getattr(properties, "placeholder_state", None)
    return state[0] if state else properties.dtype
