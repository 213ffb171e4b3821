"""Compare the stored master weights with the stored weights of the model, in bounded memory.

A step rounds the fp32 master weights into the model (`megatron_ext.resume.proof`), so that a
checkpoint in which they differ was edited, was damaged, or was written wrongly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..base.schema import Count, Real
from ..checkpoint.names import MASTER, kind_and_key
from ..checkpoint.state_keys import state_dtype
from ..checkpoint.stored import StoredCheckpoint
from .slabs import Progress, pieces_of, slab_pairs, total_bytes

#: The dtypes in which Megatron stores a model's weights.
ROUNDED = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class MasterDifference:
    """A stored tensor of master weights that is not the model's.

    Args:
        name: The model's key.
        elements: Number of elements that differ.
        of: Number of elements of the tensor.
        largest: Largest absolute difference.
    """

    name: str
    elements: Count
    of: Count
    largest: Real


@dataclass(frozen=True)
class MasterProof:
    """The comparison of all master weights of a checkpoint.

    Args:
        elements: Number of elements that were compared. Weights without a master, and state that is
            stored by position, are not.
        differences: The tensors with elements that differ.
    """

    elements: Count
    differences: tuple[MasterDifference, ...]


def masters_of(stored: StoredCheckpoint) -> dict[str, str]:
    """Return the checkpoint key of each tensor of master weights -> that of the weights."""
    out = {}
    for key, shape in stored.tensors.items():
        split = kind_and_key(key) if shape is not None else None
        if split is not None and split[0] == MASTER and stored.tensors.get(split[1]) == shape:
            out[key] = split[1]
    return out


def bytes_of(stored: StoredCheckpoint) -> int:
    """Compute how many bytes of master weights will be read."""
    return total_bytes(stored, masters_of(stored))


def prove(stored: StoredCheckpoint, progress: Progress | None = None) -> MasterProof:
    """Compare the stored master weights, rounded to the weights' dtype, with the stored weights.

    Args:
        stored: A torch_dist checkpoint.
        progress: Called with the number of bytes of master weights just read.

    Raises:
        CheckpointError: A file is damaged.
    """
    keys = masters_of(stored)
    if stored.store is None or not keys:
        return MasterProof(0, ())
    entries: Mapping[str, Any] = stored.store.index.state_dict_metadata
    pieces = pieces_of(stored.store, [*keys, *keys.values()])
    compared, differences = 0, []
    for master, weight in keys.items():
        dtype = state_dtype(entries[weight])
        if dtype not in ROUNDED:
            continue
        alike = [dataclasses.replace(piece, key=master) for piece in pieces[weight]]
        found = MasterDifference(weight, 0, 0, 0.0)
        for x, y in slab_pairs(stored.store, pieces[master], stored.store, alike, progress):
            found = compared_with(found, x, y.to(dtype))
        compared += found.of
        if found.elements:
            differences.append(found)
    return MasterProof(compared, tuple(differences))


def compared_with(
    before: MasterDifference, master: torch.Tensor, weight: torch.Tensor
) -> MasterDifference:
    """Compare a part of the master weights with the weights.

    Args:
        before: The comparison of the parts before it.
        master: Elements of the master weights.
        weight: The same elements of the model's weights, in the model's dtype.

    Returns:
        The comparison of all parts.
    """
    rounded = master.float().to(weight.dtype)
    of = before.of + master.numel()
    if torch.equal(rounded, weight):
        return dataclasses.replace(before, of=of)
    x, y = rounded.double(), weight.double()
    differs = (x != y) & ~(x.isnan() & y.isnan())
    if not (count := int(differs.sum())):
        return dataclasses.replace(before, of=of)
    distance = float((x - y)[differs].abs().nan_to_num(0.0).max())
    return MasterDifference(before.name, before.elements + count, of, max(before.largest, distance))


def explain(stored: StoredCheckpoint, proof: MasterProof) -> Sequence[str]:
    """Say what a comparison means, and what to do."""
    if not proof.elements:
        return []
    wrong = sum(d.elements for d in proof.differences)
    lines = [
        f"master weights: {proof.elements - wrong} of {proof.elements} elements are the model's "
        "weights, rounded to their dtype"
    ]
    if proof.differences:
        upstream = (
            " (stock Megatron 0.16 to 0.19 stores shifted tensors in this format if several "
            "buckets are padded: python -m megatron_ext convert SOURCE TARGET --to "
            "fully_reshardable puts them back)"
            if stored.sharding_type == "fully_reshardable"
            else ""
        )
        lines.append(
            "problem: the optimizer state does not belong to the weights: they were edited after "
            f"the save, a file is damaged, or the state was written wrongly{upstream}. A resume "
            "stops; if only the weights were edited, pass --selective-master-weights model"
        )
    return lines
