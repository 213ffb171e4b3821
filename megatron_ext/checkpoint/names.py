"""Name what a torch_dist checkpoint stores: global parameter names from checkpoint keys. Pure.

A checkpoint key is not a parameter's name. Homogeneous layers, and the experts of a layer, are
axes of one tensor, and the keys are those of TransformerEngine's fused modules. The names are the
same as those from `megatron_ext.resume.parameters` in a run.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .state_keys import parse_state_key

#: ``layers.``, but not if a number follows: such layers are stored separately.
_LAYERS = re.compile(r"(?<![^.])layers\.(?!\d)")
#: Experts of a layer are an axis or have a number (core/transformer/moe/experts.py:913, 1377).
_EXPERTS = re.compile(r"(?<=\.mlp\.experts\.)experts\.(?:(?P<number>\d+)\.)?")
#: Key of a fused module -> the local module's name (core/models/gpt/gpt_layer_specs.py:459).
_FUSED = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
#: Key of a stored object that is not a tensor (ShardedObject.unique_key, core/dist_checkpointing/
#: mapping.py, 0.19.2).
_OBJECT = re.compile(r"(?P<key>.+)/shard_(?P<place>[\d.]+)_(?P<axes>[\d.]+)")
_OF_OPTIMIZER = re.compile(r"(?:chained_\d+\.)?optimizer\.")

#: The kinds of a parameter's tensors that are no moments.
WEIGHTS, MASTER, OBJECT = "weights", "master", "object"


@dataclass(frozen=True)
class Style:
    """How a model names what the checkpoint keys do not tell apart.

    Args:
        local: Whether norms are modules of their own (``--transformer-impl local``).
        grouped: Whether the experts' weights are numbered parameters of one module.
    """

    local: bool = False
    grouped: bool = False

    @classmethod
    def of_arguments(cls, args: Mapping[str, Any]) -> Style:
        """Return the style of a run with these arguments of Megatron."""
        return cls(args.get("transformer_impl") == "local", bool(args.get("moe_grouped_gemm")))


@dataclass(frozen=True)
class Place:
    """Where the tensor of one parameter is stored.

    Args:
        key: The checkpoint key.
        lead: The position along the leading axes, which number layers and experts.
        axes: The lengths of these axes.
        shape: The unsharded shape of the parameter; empty for an object.
    """

    key: str
    lead: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]


def kind_and_key(key: str) -> tuple[str, str] | None:
    """Split a checkpoint key into the kind of the tensor and the key of the model's tensor.

    Args:
        key: A key of the store.

    Returns:
        `WEIGHTS`, `MASTER` or a key of the optimizer's state, and the model's key; None for state
        that is stored by bucket.
    """
    state = parse_state_key(key)
    if state is not None and not state.bucket:
        # ``param`` is the distributed optimizer's key, ``fp32_param`` that of the others
        # (core/optimizer/distrib_optimizer.py:1793 and optimizer.py:1168, 0.19.2).
        return (MASTER if state.state in ("param", "fp32_param") else state.state), state.name
    return None if _OF_OPTIMIZER.match(key) else (WEIGHTS, key)


def name_of(key: str, lead: Sequence[int], style: Style) -> str:
    """Name a parameter from the model's key and its position along the leading axes."""
    if style.local:
        for fused, name in _FUSED.items():
            key = key.replace(fused, name)
    layers, experts = _LAYERS.search(key), _EXPERTS.search(key)
    by_axis = (layers is not None) + (experts is not None and experts["number"] is None)
    if len(lead) != by_axis:
        return f"{key}[{', '.join(map(str, lead))}]" if lead else key
    numbers = iter(lead)
    if layers is not None:
        key = _LAYERS.sub(f"layers.{next(numbers)}.", key, count=1)
    if experts is not None:
        number = experts["number"] or next(numbers)
        # TE's grouped weights have the expert's number at their end.
        key = _EXPERTS.sub("" if style.grouped else f"local_experts.{number}.", key, count=1)
        key += str(number) if style.grouped else ""
    return key


def leading_axes(key: str) -> int:
    """Return the number of axes before the parameter's own."""
    experts = _EXPERTS.search(key)
    return (_LAYERS.search(key) is not None) + (experts is not None and experts["number"] is None)


def unstacked(key: str, shape: tuple[int, ...]) -> Iterator[Place]:
    """Yield the place of each layer and expert of a stored tensor.

    Args:
        key: The model's key.
        shape: The stored shape.
    """
    count = leading_axes(key)
    if count > len(shape):
        count = 0
    axes = shape[:count]
    for lead in itertools.product(*map(range, axes)):
        yield Place(key, lead, axes, shape[count:])


def index(
    stored: Mapping[str, tuple[int, ...] | None], style: Style
) -> dict[tuple[str, str], Place]:
    """Name every tensor of a checkpoint that belongs to a parameter.

    Args:
        stored: Checkpoint key -> shape; None for an object that is not a tensor.
        style: How the model names them.

    Returns:
        Kind and name -> its place.
    """
    out: dict[tuple[str, str], Place] = {}
    for key, shape in stored.items():
        if shape is None:
            found = _OBJECT.fullmatch(key)
            if found is not None and found["key"].endswith("_extra_state"):
                lead, axes = (tuple(map(int, found[x].split("."))) for x in ("place", "axes"))
                place = Place(found["key"], lead, axes, ())
                out[OBJECT, object_name(place.key, lead, axes, style)] = place
            continue
        split = kind_and_key(key)
        if split is None:
            continue
        kind, model_key = split
        for one in unstacked(model_key, shape):
            name = name_of(model_key, one.lead, style)
            out[kind, name] = Place(key, one.lead, one.axes, one.shape)
    return out


def object_name(key: str, lead: tuple[int, ...], axes: tuple[int, ...], style: Style) -> str:
    """Name a module's extra state. Without leading axes it has one of length 1."""
    return name_of(key, () if axes == (1,) and leading_axes(key) == 0 else lead, style)
