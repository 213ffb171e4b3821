"""Compare the stored master weights with the stored weights of the model, in bounded memory.

A step rounds the fp32 master weights into the model (`megatron_ext.resume.proof`), so that a
checkpoint in which they differ was edited, was damaged, or was written wrongly. Two kinds of
Transformer Engine's are no fp32 master weights:

- Remainders, the low halves of master weights whose high halves are the model's bf16 weights
  (``store_param_remainders``, core/optimizer/optimizer_config.py:192, 0.19.2). They are stored as
  int16, or as whole floats if the state is by parameter. Every weight fits them.
- fp16 master weights, which may differ by one rounding (`megatron_ext.checkpoint.fp16_masters`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..base.schema import Count, Real
from ..checkpoint import fp16_masters
from ..checkpoint.names import MASTER, kind_and_key
from ..checkpoint.state_keys import state_dtype
from ..checkpoint.stored import StoredCheckpoint
from .slabs import Progress, moment_keys, pieces_of, slab_pairs, total_bytes

#: The dtypes in which Megatron stores a model's weights.
ROUNDED = (torch.bfloat16, torch.float16, torch.float32)
REMAINDER = torch.int16
_LOW, _HIGH = torch.iinfo(REMAINDER).min, torch.iinfo(REMAINDER).max

#: What is said of remainders.
ONLY_HALF = (
    "they are remainders (store_param_remainders), the low 16 bits of master weights whose high 16 "
    "bits are the model's bf16 weights, and fit any weights"
)


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
        elements: Number of elements that were compared. Weights without a master, remainders, and
            state that is stored by position, are not.
        differences: The tensors with elements that differ.
        rounded_twice: Number of elements that are one rounding away from the weights. If the
            checkpoint's arguments have ``--main-params-dtype fp16``, they do not differ.
        remainders: Number of elements that are remainders, which fit any weights.
    """

    elements: Count
    differences: tuple[MasterDifference, ...] = ()
    rounded_twice: Count = 0
    remainders: Count = 0


@dataclass(frozen=True)
class Compared:
    """The comparison of the parts of one tensor.

    Args:
        name: The model's key.
        of: Number of elements.
        differing: Number of elements that are not the weights.
        rounded_twice: Number of these that are one rounding away from them.
        largest: Largest absolute difference.
        whole: Whether all elements are whole numbers of 16 bits, and the weights bf16.
    """

    name: str
    of: int = 0
    differing: int = 0
    rounded_twice: int = 0
    largest: float = 0.0
    whole: bool = True


def masters_of(stored: StoredCheckpoint) -> dict[str, str]:
    """Return the checkpoint key of each tensor of master weights -> that of the weights."""
    out = {}
    for key, shape in stored.tensors.items():
        split = kind_and_key(key) if shape is not None else None
        if split is not None and split[0] == MASTER and stored.tensors.get(split[1]) == shape:
            out[key] = split[1]
    return out


def has_remainders(stored: StoredCheckpoint) -> bool:
    """Whether the index says that the master weights are remainders.

    In state by parameter they are floats, which only `prove` recognises.
    """
    if stored.store is None:
        return False
    entries = stored.store.index.state_dict_metadata
    return any(
        found.state == "param" and state_dtype(entries[key]) == REMAINDER
        for key, found in moment_keys(stored).items()
    )


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
        return MasterProof(0)
    entries: Mapping[str, Any] = stored.store.index.state_dict_metadata
    pieces = pieces_of(stored.store, [*keys, *keys.values()])
    compared = []
    for master, weight in keys.items():
        dtype = state_dtype(entries[weight])
        if dtype not in ROUNDED:
            continue
        alike = [dataclasses.replace(piece, key=master) for piece in pieces[weight]]
        found = Compared(weight)
        for x, y in slab_pairs(stored.store, pieces[master], stored.store, alike, progress):
            found = compared_with(found, x, y.to(dtype))
        compared.append(found)
    return conclude(compared, stored.args)


def compared_with(before: Compared, master: torch.Tensor, weight: torch.Tensor) -> Compared:
    """Compare a part of the master weights with the weights.

    Args:
        before: The comparison of the parts before it.
        master: Elements of the master weights.
        weight: The same elements of the model's weights, in the model's dtype.

    Returns:
        The comparison of all parts.
    """
    rounded = master.float().to(weight.dtype)
    of, whole = before.of + master.numel(), before.whole and _whole(master, weight)
    if torch.equal(rounded, weight):
        return dataclasses.replace(before, of=of, whole=whole)
    x, y = rounded.double(), weight.double()
    differs = (x != y) & ~(x.isnan() & y.isnan())
    distance = (x - y)[differs].abs().nan_to_num(0.0, posinf=torch.inf)
    near = fp16_masters.distance(master.double(), weight)[differs] >= distance
    largest = float(distance.max()) if len(distance) else 0.0
    return Compared(
        before.name,
        of,
        before.differing + len(distance),
        before.rounded_twice + int(near.sum()),
        max(before.largest, largest),
        whole,
    )


def conclude(compared: Iterable[Compared], args: Mapping[str, Any]) -> MasterProof:
    """Say of all tensors together what they hold, and which of them differ.

    An optimizer's state has either remainders or master weights, so that whole numbers are
    remainders only if no tensor has anything else. A resume decides likewise.

    Args:
        compared: The comparison of each tensor.
        args: The arguments in the checkpoint.
    """
    found = sorted(compared, key=lambda c: c.name)
    of, twice = sum(c.of for c in found), sum(c.rounded_twice for c in found)
    if all(c.whole for c in found) and any(c.differing for c in found):
        return MasterProof(0, remainders=of)
    fp16 = is_fp16(args)
    counts = [(c, c.differing - (c.rounded_twice if fp16 else 0)) for c in found]
    differences = (MasterDifference(c.name, n, c.of, c.largest) for c, n in counts if n)
    return MasterProof(of, tuple(differences), twice)


def is_fp16(args: Mapping[str, Any]) -> bool:
    """Whether the run that saved a checkpoint had fp16 master weights.

    Args:
        args: The arguments in the checkpoint.
    """
    return args.get("main_params_dtype") == torch.float16


def _whole(master: torch.Tensor, weight: torch.Tensor) -> bool:
    if weight.dtype != torch.bfloat16:
        return False
    low_enough = (master >= _LOW) & (master <= _HIGH)
    return bool((low_enough & (master == master.round())).all())


def explain(stored: StoredCheckpoint, proof: MasterProof) -> Sequence[str]:
    """Say what a comparison means, and what to do."""
    if proof.remainders:
        return [f"master weights: {proof.remainders} elements were not compared: {ONLY_HALF}"]
    if not proof.elements:
        return []
    wrong = sum(d.elements for d in proof.differences)
    twice = proof.rounded_twice if is_fp16(stored.args) else 0
    apart = f"; {twice} of these are one rounding away, as fp16 master weights are" if twice else ""
    lines = [
        f"master weights: {proof.elements - wrong} of {proof.elements} elements are the model's "
        f"weights, rounded to their dtype{apart}"
    ]
    if proof.differences and proof.rounded_twice == wrong:
        lines.append(
            "problem: all elements that differ are one rounding away from the weights. So are fp16 "
            "master weights (--main-params-dtype fp16), and the checkpoint's arguments do not name "
            "the flag. A resume with the flag loads them; one without it needs "
            "--selective-master-weights model"
        )
    elif proof.differences:
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
