"""Find this rank's shards in the unsharded parameters, by global name.

The model's sharded state dict gives the global shape of every parameter and this rank's offset,
under any tensor, pipeline, virtual pipeline or expert parallelism. The range maps of the
distributed optimizer give its part of that shard.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..base.placement import Block, Run, block_of, runs
from ..errors import HostError
from ..host.optimizers import OptimizerState, state_of
from ..plan.parameters import Parameter
from . import vocabulary

#: A local index in a parameter's name: a position in a list, or TE's grouped weights (weight3).
_INDEX = re.compile(r"(?<=\.)\d+(?=\.)|(?<=\.weight)\d+$|(?<=\.bias)\d+$")

#: Id of a model parameter -> its global name, unsharded shape and the blocks of this rank's part.
Located = Mapping[int, tuple[str, tuple[int, ...], tuple[Block, ...]]]


@dataclass(frozen=True)
class Shard:
    """The part of one parameter that this rank's optimizer holds.

    Args:
        parameter: The unsharded parameter.
        blocks: The blocks of the tensor-parallel shard, in its order.
        begin: First element that this rank's optimizer holds of the flattened tensor-parallel
            shard.
        end: One past the last element.
        inner: The torch optimizer with the state.
        key: The tensor that is the key of its state.
    """

    parameter: Parameter
    blocks: tuple[Block, ...]
    begin: int
    end: int
    inner: Any
    key: torch.Tensor

    @property
    def has_moments(self) -> bool:
        """Whether the optimizer has state for it."""
        held = self.inner.state.get(self.key, {})
        return bool(self.state.moments) and all(key in held for key in self.state.tensors)

    @property
    def state(self) -> OptimizerState:
        """The description of the optimizer's state."""
        return state_of(self.inner)

    def runs(self) -> Iterator[Run]:
        """Yield the runs of its elements in the unsharded parameter."""
        return runs(self.blocks, self.begin, self.end)


def shards_of(
    optimizer: Any, model_chunks: Sequence[Any], where: Located | None = None
) -> list[Shard]:
    """List the shards of a Megatron optimizer on this rank.

    Args:
        optimizer: A DistributedOptimizer, Float16OptimizerWithFloat16Params or FP32Optimizer.
        model_chunks: The model it was built for.
        where: The result of `locate_parameters` for this model, if it has been computed.

    Raises:
        HostError: The model's sharded_state_dict does not place a parameter.
    """
    found = locate_parameters(model_chunks) if where is None else where
    rows = vocabulary.rows_of(optimizer)
    out = []
    for held in held_parameters(optimizer):
        if id(held.model_param) not in found:
            raise HostError(
                f"the model's sharded_state_dict has no entry for a parameter of shape "
                f"{tuple(held.model_param.shape)}, so that its global name is not known. Rules for "
                "moments need it: use the default policy, or give its module a sharded_state_dict"
            )
        name, shape, blocks = found[id(held.model_param)]
        change = None if rows is None else rows.of(held.model_param)
        saved_rows = None if change is None else change.saved
        parameter = Parameter(name, shape, held.group, saved_rows)
        out.append(Shard(parameter, blocks, held.begin, held.end, optimizer.optimizer, held.key))
    return out


def names_of(optimizer: Any, model_chunks: Sequence[Any]) -> dict[int, str]:
    """Map the id of each state key to a name for messages.

    The names are local ones if the model gives no global ones.
    """
    try:
        return {id(s.key): s.parameter.name for s in shards_of(optimizer, model_chunks)}
    except Exception:  # the model's own code may raise anything; the message is still needed
        names = {id(p): n for chunk in model_chunks for n, p in chunk.named_parameters()}
        held = held_parameters(optimizer)
        return {id(h.key): names.get(id(h.model_param), "unnamed") for h in held}


@dataclass(frozen=True)
class Held:
    """A parameter that an optimizer holds, wholly or in part.

    Args:
        model_param: The model's parameter.
        key: The tensor that is the key of its state.
        group: Position of its param_group.
        begin: First element of the flattened model parameter that is held.
        end: One past the last element.
    """

    model_param: torch.Tensor
    key: torch.Tensor
    group: int
    begin: int
    end: int


def held_parameters(optimizer: Any) -> list[Held]:
    """List what an optimizer holds on this rank, in the same order at every call."""
    if hasattr(optimizer, "model_param_gbuf_map"):
        return [_distributed(optimizer, p) for p in optimizer.model_param_gbuf_map]
    models = {}
    for of_model, of_main in zip(
        getattr(optimizer, "float16_groups", ()),
        getattr(optimizer, "fp32_from_float16_groups", ()),
        strict=True,
    ):
        models.update({id(main): model for model, main in zip(of_model, of_main, strict=True)})
    return [
        Held(models.get(id(param), param), param, number, 0, param.numel())
        for number, group in enumerate(optimizer.optimizer.param_groups)
        for param in group["params"]
    ]


def state_key(optimizer: Any, model_param: torch.Tensor) -> torch.Tensor:
    """Return the key of a model parameter's state in a distributed optimizer."""
    group, order = optimizer.model_param_group_index_map[model_param]
    key: torch.Tensor = optimizer.optimizer.param_groups[group]["params"][order]
    return key


def _distributed(optimizer: Any, model_param: torch.Tensor) -> Held:
    group, _ = optimizer.model_param_group_index_map[model_param]
    of_shard = optimizer._get_model_param_range_map(model_param)["param"]
    key = state_key(optimizer, model_param)
    return Held(model_param, key, group, of_shard.start, of_shard.end)


def locate_parameters(model_chunks: Sequence[Any]) -> Located:
    """Map the id of each model parameter to its global name, unsharded shape and blocks.

    Args:
        model_chunks: The model on this rank.

    Raises:
        HostError: The model's sharded_state_dict does not place a parameter.
    """
    out = {}
    for chunk in model_chunks:
        module = chunk
        while hasattr(module, "module"):
            module = module.module
        local = {id(p): name for name, p in module.named_parameters()}
        for entry in _flat(module.sharded_state_dict()):
            # An entry is a ShardedTensor, or a ShardedTensorFactory that builds several.
            if id(getattr(entry, "data", None)) in local:
                out[id(entry.data)] = _locate(local[id(entry.data)], entry)
    return out


def _locate(name: str, entry: Any) -> tuple[str, tuple[int, ...], tuple[Block, ...]]:
    # A factory builds the parts that are sharded separately, such as the halves of a gated fc1.
    parts = list(_flat(entry.build() if hasattr(entry, "build_fn") else entry))
    extra = parts[0].prepend_axis_num
    global_name = _global_name(name, entry.key, parts[0].global_offset[:extra])
    shapes: dict[str, tuple[int, ...]] = {}
    blocks = []
    for part in parts:
        shape = tuple(part.global_shape[extra:])
        if part.key not in shapes and shapes and shape[1:] != next(iter(shapes.values()))[1:]:
            raise HostError(
                f"{global_name} is stored in parts of the shapes {[*shapes.values(), shape]}, "
                "which are not rows of one matrix; rules for moments do not support that"
            )
        first_row = sum(s[0] for key, s in _before(shapes, part.key))
        shapes.setdefault(part.key, shape)
        local = tuple(part.local_shape)
        blocks.append(block_of(shape, part.global_offset[extra:], local, first_row))
    one = next(iter(shapes.values()))
    whole = (sum(s[0] for s in shapes.values()), *one[1:]) if len(shapes) > 1 else one
    numel = math.prod(entry.data.shape)
    if sum(b.length for b in blocks) != numel:
        raise HostError(
            f"{global_name} has {numel} elements on this rank, and its sharded parts "
            f"{[b.length for b in blocks]}; rules for moments do not support that"
        )
    return global_name, whole, tuple(blocks)


def _before(shapes: Mapping[str, tuple[int, ...]], key: str) -> list[tuple[str, tuple[int, ...]]]:
    items = list(shapes.items())
    known = [k for k, _ in items]
    return items[: known.index(key)] if key in shapes else items


def _flat(entry: Any) -> Iterator[Any]:
    if isinstance(entry, Mapping):
        entry = list(entry.values())
    if isinstance(entry, list | tuple):
        for one in entry:
            yield from _flat(one)
    else:
        yield entry


def _global_name(name: str, key: str, offsets: Sequence[int]) -> str:
    """Replace the local indices in a parameter's name with global ones.

    Keys of homogeneous layers have no index, because the layer and the expert are separate axes. A
    parameter without an index gets its key as name: a tied output layer has the embedding's.
    """
    local = _INDEX.findall(name)
    if not local:
        return key
    indices = [*_INDEX.findall(key), *map(str, offsets)]
    if len(indices) != len(local):
        raise HostError(
            f"cannot tell the global name of {name}: the checkpoint key {key} with offsets "
            f"{tuple(offsets)} has {len(indices)} indices; expected {len(local)}"
        )
    numbers = iter(indices)
    return _INDEX.sub(lambda _: next(numbers), name)
