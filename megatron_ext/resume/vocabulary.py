"""A vocabulary of another size than the checkpoint's: the rows that it has and those it has not.

Megatron pads the vocabulary to a multiple of the tensor-parallel size, and lets the embedding and
the output layer differ in rows from what is stored (``allow_shape_mismatch``,
core/tensor_parallel/layers.py:396 and core/models/common/language_module/language_module.py:456,
0.19.2). Before a load it sets such tensors to zero, in the live model too
(core/dist_checkpointing/strategies/torch.py:289), so that rows the checkpoint does not have end up
as zeros, in the weights and in the fp32 master weights. Here they keep what they were initialised
with: it is copied before the load and put back into what the load returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import CheckpointError
from ..plan.resized import RowChange

#: Stored by buckets of a model with one certain number of rows.
_BY_BUCKET = "optimizer.distributed."
#: Where a non-distributed optimizer's sharded state dict has the live fp32 master weights
#: (core/optimizer/optimizer.py:1162, 0.19.2). Those of a distributed one are put back shard by
#: shard (`SelectiveAdam`): its entries are buffers without values.
_MASTERS = "fp32_from_fp16_params"


class RowChanges:
    """The model parameters of one load that have another number of rows than the checkpoint."""

    def __init__(self) -> None:
        self._of: MutableMapping[torch.Tensor, RowChange] = WeakIdKeyDictionary()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return len(self._of) > 0

    def __setitem__(self, model_param: torch.Tensor, change: RowChange) -> None:
        """Note a change."""
        self._of[model_param] = change

    def of(self, model_param: torch.Tensor) -> RowChange | None:
        """The change of a model parameter; None if its rows are the checkpoint's."""
        return self._of.get(model_param)

    def clear(self) -> None:
        """No optimizer will take what was found."""
        self._of.clear()

    def first_new_element(self, model_param: torch.Tensor) -> int | None:
        """First element of the flattened shard that the checkpoint does not have; None: it has all.

        Args:
            model_param: This rank's tensor-parallel shard.
        """
        change = self.of(model_param)
        if change is None or change.first_new >= model_param.shape[0]:
            return None
        return change.first_new * (model_param.numel() // model_param.shape[0])


@dataclass
class Resized:
    """The entries of a sharded state dict that have another number of rows than the checkpoint.

    Args:
        changes: What has changed, one for each model parameter on this rank.
        kept: Where in the state dict new rows are, the first of them, and their values.
    """

    changes: list[RowChange] = field(default_factory=list)
    kept: list[tuple[tuple[Any, ...], int, torch.Tensor]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What has changed, as log lines."""
        return [f" > {change}" for change in self.changes]

    @torch.no_grad()
    def put_back(self, state_dict: Any) -> None:
        """Give the new rows the values that they had before the load.

        Args:
            state_dict: What ``dist_checkpointing.load`` returned; its tensors are changed in
                place.
        """
        for path, first, rows in self.kept:
            found = state_dict
            for step in path:
                found = found[step]
            found[first:] = rows.to(found)


def find_resized(
    state_dict: Any,
    sharded_tensor: Any,
    optimizer_prefix: str,
    stored: Callable[[], Mapping[str, tuple[int, ...] | None]],
    rows: RowChanges,
) -> Resized:
    """Compare a sharded state dict with the checkpoint it is about to be filled from.

    Not collective. The checkpoint's metadata is read only where an entry may change its rows.

    Args:
        state_dict: The sharded state dict; not modified.
        sharded_tensor: Megatron's ShardedTensor.
        optimizer_prefix: In every checkpoint key of the optimizer's entries.
        stored: Reads the checkpoint key and global shape of everything that is stored.
        rows: Gets the changes of model parameters.

    Returns:
        What has another number of rows, with copies of the new ones.
    """
    entries = [
        (path, entry)
        for path, entry in walk(state_dict)
        if isinstance(entry, sharded_tensor)
        and getattr(entry, "allow_shape_mismatch", False)
        and isinstance(entry.data, torch.Tensor)
    ]
    resized = Resized()
    if not entries:
        return resized
    shapes = stored()
    for path, entry in entries:
        of_model = optimizer_prefix not in entry.key
        change = _compare(entry, shapes.get(entry.key))
        if change is None:
            continue
        if of_model:
            rows[entry.data] = change
            resized.changes.append(change)
        if (of_model or _MASTERS in path) and change.first_new < entry.data.shape[0]:
            copied = entry.data[change.first_new :].detach().clone()
            resized.kept.append((path, change.first_new, copied))
    return resized


def rows_of(optimizer: Any) -> RowChanges | None:
    """The changed rows of the load that a Megatron optimizer takes part in; None without one."""
    load = getattr(getattr(optimizer, "resume", None), "load", None)
    return None if load is None else load.rows


def unsupported(resized: Resized, optimizer_keys: Mapping[str, Any]) -> CheckpointError | None:
    """The error for an optimizer state that is stored for one number of rows only, or None.

    Args:
        resized: What has changed.
        optimizer_keys: Checkpoint keys of the optimizer's entries.
    """
    if not resized.changes or not by_bucket(optimizer_keys):
        return None
    form = "dp_reshardable" if any(".gbuf_idx_" in k for k in optimizer_keys) else "gathered"
    return refusal(resized.changes[0], f"{form}, by buckets of parameters one after the other")


def by_bucket(optimizer_keys: Mapping[str, Any]) -> bool:
    """Whether the optimizer state is stored in the order of the optimizer's buffers."""
    return any(_BY_BUCKET in key for key in optimizer_keys)


def refusal(change: RowChange, form: str) -> CheckpointError:
    """The error for a format that cannot give a resized vocabulary its moments.

    Args:
        change: One parameter.
        form: How the optimizer state is stored.
    """
    return CheckpointError(
        f"the vocabulary has another size than in the checkpoint ({change.key}: {change.saved} "
        f"rows there, {change.now} here; padding counts, and changes with "
        "--tensor-model-parallel-size and --make-vocab-size-divisible-by), and the optimizer "
        f"state is stored as {form}: it fits the old size alone. Run the old configuration, old "
        "vocabulary and old parallel sizes, for one more save with --ckpt-format torch_dist "
        "--dist-ckpt-optim-fully-reshardable, and resume from that; or pass --no-load-optim to "
        "start with a new optimizer (the Adam moments are then lost)"
    )


def _compare(entry: Any, saved: tuple[int, ...] | None) -> RowChange | None:
    """The change of a ShardedTensor's rows; None where its shape is the same, or another model's.

    The latter is left to the load, which knows what does not fit.
    """
    axis, now = entry.prepend_axis_num, tuple(entry.global_shape)
    if saved is None or saved == now or len(saved) != len(now):
        return None
    if (*saved[:axis], *saved[axis + 1 :]) != (*now[:axis], *now[axis + 1 :]):
        return None
    rows = entry.local_shape[0]
    first_new = min(max(saved[axis] - entry.global_offset[axis], 0), rows)
    return RowChange(entry.key, saved[axis], now[axis], first_new)


def walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every entry of a sharded state dict, with the steps that lead to it."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from walk(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from walk(inner, (*path, index))
    else:
        yield path, value
