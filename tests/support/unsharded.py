"""The optimizer's state put together from all ranks, without this package's help.

What Megatron does to a GPT model's parameters is written down here once more: which are cut by rows
or columns, how layers and experts are numbered, and what the distributed optimizer holds of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.distributed as dist

from . import harness

KEYS = ("param", "exp_avg", "exp_avg_sq")

State = dict[str, dict[str, np.ndarray]]

_BY_ROWS = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.", "linear_fc1.")
_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def gather(run: harness.Run) -> State:
    """Global name -> state key -> unsharded float32 array; fails unless all copies are equal."""
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, list(_pieces(run)))
    state: State = {}
    seen: dict[str, np.ndarray] = {}
    for name, shape, where, values in (piece for of_rank in pieces for piece in of_rank):
        target = state.setdefault(name, {k: np.zeros(shape, np.float32) for k in KEYS})
        known = seen.setdefault(name, np.zeros(shape, bool)).reshape(-1)
        for key, value in values.items():
            flat = target[key].reshape(-1)
            again = known[where]
            np.testing.assert_array_equal(flat[where][again], value[again], err_msg=name)
            flat[where] = value
        known[where] = True
    assert all(s.all() for s in seen.values())
    return state


def held_values(run: harness.Run, state: State) -> Iterator[tuple[Any, Any, dict[str, np.ndarray]]]:
    """This rank's part of an unsharded state: the torch optimizer, the key, and the values."""
    for optimizer, main, name, where, _ in _located(run):
        values = {k: v.reshape(-1)[where] for k, v in state[name].items()}
        yield optimizer.optimizer, main, values


def weights(run: harness.Run) -> dict[str, np.ndarray]:
    """Global name -> the model's own weights, unsharded; fails unless all copies are equal."""
    from megatron.core import parallel_state

    if run.layout.overlap and run.losses:
        # The last step's weights are gathered only by the next forward pass.
        for chunk in run.model:
            chunk.disable_forward_pre_hook(param_sync=True)
            chunk.enable_forward_pre_hook()
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    mine = []
    for chunk in run.model:
        for name, param in _named(chunk):
            split = 1 if ".experts." in name else size
            shape, where = _cut(name, tuple(param.shape), split, rank, _gated(run, name))
            mine.append((name, shape, where, param.detach().float().numpy().copy()))
    pieces: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(pieces, mine)
    found: dict[str, np.ndarray] = {}
    for name, shape, where, values in (piece for of_rank in pieces for piece in of_rank):
        flat = found.setdefault(name, np.full(shape, np.nan, np.float32)).reshape(-1)
        again = ~np.isnan(flat[where])
        np.testing.assert_array_equal(flat[where][again], values[again], err_msg=name)
        flat[where] = values
    assert not any(np.isnan(w).any() for w in found.values())
    return found


def _pieces(
    run: harness.Run,
) -> Iterator[tuple[str, tuple[int, ...], np.ndarray, dict[str, np.ndarray]]]:
    for optimizer, main, name, where, shape in _located(run):
        tensors = harness.values_of(optimizer.optimizer, main)
        values = {k: t.detach().float().numpy().reshape(-1) for k, t in tensors.items()}
        yield name, shape, where, {k: v.copy() for k, v in values.items()}


def _located(
    run: harness.Run,
) -> Iterator[tuple[Any, Any, str, np.ndarray, tuple[int, ...]]]:
    """Each optimizer, a key of its state, its name, its indices and the unsharded shape."""
    from megatron.core import parallel_state

    names = {id(p): name for chunk in run.model for name, p in _named(chunk)}
    size = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    for optimizer in getattr(run.optimizer, "chained_optimizers", [run.optimizer]):
        for model_param, main, begin, end in _held(optimizer):
            name = names[id(model_param)]
            split = 1 if ".experts." in name else size  # no tensor parallelism for experts here
            shape, index = _cut(name, tuple(model_param.shape), split, rank, _gated(run, name))
            yield optimizer, main, name, index.reshape(-1)[begin:end], shape


def _gated(run: harness.Run, name: str) -> bool:
    return bool(run.layout.experts or run.layout.gated) and ".linear_fc1." in name


def _cut(
    name: str, local: tuple[int, ...], size: int, rank: int, gated: bool
) -> tuple[tuple[int, ...], np.ndarray]:
    """Unsharded shape, and for each local element its index there."""
    if any(part in name for part in _BY_ROWS):
        shape = (local[0] * size, *local[1:])
        whole = np.arange(np.prod(shape)).reshape(shape)
        halves = np.split(whole, 2) if gated else [whole]
        return shape, np.concatenate([np.split(h, size)[rank] for h in halves])
    if any(part in name for part in _BY_COLUMNS):
        shape = (local[0], local[1] * size)
        return shape, np.split(np.arange(np.prod(shape)).reshape(shape), size, axis=1)[rank]
    return local, np.arange(np.prod(local)).reshape(local)


def _named(chunk: Any) -> Iterator[tuple[str, Any]]:
    from megatron.core import parallel_state

    model = harness.unwrapped(chunk)
    layers = {i: layer.layer_number - 1 for i, layer in enumerate(model.decoder.layers)}
    first_expert = 0
    for name, param in model.named_parameters():
        words = name.split(".")
        if words[:2] == ["decoder", "layers"]:
            words[2] = str(layers[int(words[2])])
        if "local_experts" in words:
            at = words.index("local_experts") + 1
            local = len(model.decoder.layers[0].mlp.experts.local_experts)
            first_expert = parallel_state.get_expert_model_parallel_rank() * local
            words[at] = str(first_expert + int(words[at]))
        yield ".".join(words), param


def _held(optimizer: Any) -> Iterator[tuple[Any, Any, int, int]]:
    groups = optimizer.optimizer.param_groups
    if hasattr(optimizer, "model_param_gbuf_map"):
        for model_param, (group, order) in optimizer.model_param_group_index_map.items():
            held = optimizer._get_model_param_range_map(model_param)["param"]
            yield model_param, groups[group]["params"][order], held.start, held.end
        return
    mains = {}
    for models, copies in zip(
        getattr(optimizer, "float16_groups", []),
        getattr(optimizer, "fp32_from_float16_groups", []),
        strict=True,
    ):
        mains.update({id(copy): model for model, copy in zip(models, copies, strict=True)})
    for group in groups:
        for main in group["params"]:
            yield mains.get(id(main), main), main, 0, main.numel()
