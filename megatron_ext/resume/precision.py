"""Load the state of TransformerEngine's FusedAdam into the dtypes that it stores now.

With --use-precision-aware-optimizer FusedAdam has the master weights in its state: in fp32, in fp16
with a scale, or as remainders (``store_param_remainders``). A remainder is the low 16 bits of an
fp32 master weight whose upper half is the model's bf16 weight. Stock writes remainders as int16
(dp_reshardable) or as floats (fully_reshardable and legacy torch, where its own load fails with an
assertion). It loads remainders as master weights into a run without the flag, and rounds master
weights to integers for a run with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..host.optimizers import state_of
from .parameters import held_parameters, state_key
from .paths import walk
from .proof import Difference, Proof
from .scaled import is_scaled, store
from .steps import is_hybrid
from .vocabulary import rows_of

#: Key of the master weights in the state.
_MASTER = "master_param"
_REMAINDER = torch.int16
#: So many elements tell most master weights from remainders.
_FEW = 1024


def store_scaled(
    optimizer: Any, model_param: torch.Tensor, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """Store the loaded moments that have a scale.

    Returns:
        What is left for the stock loader: tensors, because that of 0.16 fails with the mark of
        padding in dp_reshardable, which 0.17 leaves out.
    """
    inner, param = optimizer.optimizer, state_key(optimizer, model_param)
    if _MASTER not in inner.state.get(param, {}):
        return dict(tensors)
    scaled = [key for key in state_of(inner).tensors if key in tensors and is_scaled(inner, key)]
    for key in scaled:
        store(inner, param, key, tensors[key])
    return {k: v for k, v in tensors.items() if k not in scaled and isinstance(v, torch.Tensor)}


@torch.no_grad()
def initialise_masters(optimizer: Any) -> None:
    """Make the master weights that were just allocated from the model's initial weights.

    Stock allocates them uninitialised before a load. Rows that the checkpoint does not have keep
    them (core/optimizer/distrib_optimizer.py:993, 0.19.2).
    """
    inner = optimizer.optimizer
    for held in held_parameters(optimizer):
        master = inner.state.get(held.key, {}).get(_MASTER)
        if master is None or is_hybrid(inner):  # with CPU offload they are made with the optimizer
            continue
        if master.dtype == _REMAINDER:
            master.zero_()
        else:
            inner.set_scaled_state(held.key, _MASTER, held.key.detach().float())


@torch.no_grad()
def fit_masters(
    optimizer: Any, model_param: torch.Tensor, loaded: torch.Tensor, proof: Proof
) -> torch.Tensor:
    """Return the loaded master weights of a shard as a distributed optimizer stores them.

    Args:
        optimizer: The optimizer, with allocated state.
        model_param: The model's parameter, which has been loaded. Rows that the checkpoint lacks
            keep the optimizer's master weights.
        loaded: Master weights or remainders from the checkpoint.
        proof: Takes the comparison with the model's weights, where the optimizer stores remainders.
    """
    inner, key = optimizer.optimizer, state_key(optimizer, model_param)
    held = inner.state.get(key, {}).get(_MASTER, key)
    shard = optimizer._get_model_param_range_map(model_param)["param"]
    flat, size = loaded.view(-1), loaded.numel()
    rows = rows_of(optimizer)
    first = None if rows is None else rows.first_new_element(model_param)
    at = size if first is None else min(max(first - shard.start, 0), size)
    weight = model_param.data.view(-1)[shard.start : shard.start + at]
    old = _converted(held.dtype, flat[:at], weight, proof, id(model_param))
    if held.dtype == _REMAINDER and old.dtype != _REMAINDER:
        proof.compare(model_param, flat[:at], shard.start, shard.start + at)
        old = _remainders(flat[:at], weight)
    if at == size:
        return old.view(loaded.shape)
    live = held
    if held.dtype == torch.float16 and held is not key:
        live = inner.get_unscaled_state(key, _MASTER)
    return torch.cat([old, live.detach().view(-1)[at:].to(old.dtype)])


def _converted(
    wanted: torch.dtype, loaded: torch.Tensor, weight: torch.Tensor, proof: Proof, number: int
) -> torch.Tensor:
    """Return remainders as they are wanted; what is not a remainder is returned unchanged.

    Whole numbers that are not the weights are taken for remainders. The state of an optimizer has
    either remainders or master weights, so that `Proof` notes both for all ranks to compare. The
    first parameter that has master weights for certain tells of all that follow, which costs no
    look at their elements: a GPU is waited for once.
    """
    if weight.dtype != torch.bfloat16 or type(weight) is not torch.Tensor:
        return loaded
    if proof.masters and loaded.dtype != _REMAINDER:
        proof.masters += loaded.numel()
        return loaded
    here = weight.to(loaded.device)
    if loaded.dtype != _REMAINDER:
        if not (_integers(loaded[:_FEW]) and _integers(loaded)):
            proof.masters += loaded.numel()
            return loaded
        if _rounds(loaded, here):
            return loaded  # such as norms that are all 1: either
        distance = (loaded.float() - here.float()).abs()
        proof.remainders[number] = Difference(
            int((distance > 0).sum()), loaded.numel(), float(distance.max())
        )
    else:
        proof.remainders[number] = Difference(0, loaded.numel(), 0.0)
    remainder = loaded.to(_REMAINDER)
    return remainder if wanted == _REMAINDER else joined(here, remainder)


def _remainders(master: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Split master weights. torch rounds a tie to even; one that it rounds down loses a bit."""
    distance = master.float().view(torch.int32) - _upper(weight)
    limits = torch.iinfo(_REMAINDER)
    return distance.clamp(limits.min, limits.max).to(_REMAINDER)


def joined(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Join bf16 weights and their remainders to fp32 master weights.

    The weight is the master weight rounded to nearest, so that a negative remainder belongs to a
    weight that was rounded up (transformer_engine/common/multi_tensor/adam.cu).
    """
    return (_upper(weight) + remainder.int()).view(torch.float32)


def load_whole_masters(state_dict: Any, stored: Callable[[], Mapping[str, torch.dtype]]) -> None:
    """Request stored fp32 master weights as such where the optimizer has remainders.

    torch would round them to integers. `fit_masters` splits them.

    Args:
        state_dict: A sharded state dict for a load. Its entries are modified in place.
        stored: Reads the dtype of each stored tensor.
    """
    found = [
        entry
        for _, entry in walk(state_dict)
        if isinstance(data := getattr(entry, "data", None), torch.Tensor)
        and data.dtype == _REMAINDER
    ]
    dtypes = stored() if found else {}
    for entry in found:
        if (dtype := dtypes.get(entry.key, _REMAINDER)) != _REMAINDER:
            entry.data, entry.dtype = torch.empty_like(entry.data, dtype=dtype), dtype


def _upper(weight: torch.Tensor) -> torch.Tensor:
    """The bits of the fp32 values of bf16 weights."""
    return weight.contiguous().view(torch.int16).int() << 16


def _rounds(master: torch.Tensor, weight: torch.Tensor) -> bool:
    return bool((master.to(weight.dtype).view(torch.int16) == weight.view(torch.int16)).all())


def _integers(values: torch.Tensor) -> bool:
    limits = torch.iinfo(_REMAINDER)
    return bool(
        ((values == values.round()) & (values >= limits.min) & (values <= limits.max)).all()
    )
