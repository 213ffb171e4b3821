"""Keep the initial values of vocabulary rows that the checkpoint does not have.

Megatron pads the vocabulary to a multiple of the tensor-parallel size. The embedding and the output
layer may have another number of rows than the stored ones (``allow_shape_mismatch``,
core/tensor_parallel/layers.py:396 and core/models/common/language_module/language_module.py:456,
0.19.2). Before a load Megatron sets such tensors to zero, in the live model too
(core/dist_checkpointing/strategies/torch.py:289). Rows that the checkpoint does not have would thus
become zero in the weights and in the fp32 master weights. This module copies their initial values
before the load and writes them into its result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import CheckpointError
from ..plan.resized import RowChange
from .paths import value_at, walk

#: Key prefix of state that is stored by bucket, which fits only one number of rows.
_BY_BUCKET = "optimizer.distributed."
#: Key of the live fp32 master weights in a non-distributed optimizer's sharded state dict
#: (core/optimizer/optimizer.py:1162, 0.19.2). The entries of a distributed one are buffers without
#: values, so that `SelectiveAdam` restores its rows shard by shard.
_MASTERS = "fp32_from_fp16_params"


class RowChanges:
    """The model parameters of one load whose number of rows differs from the checkpoint's."""

    def __init__(self) -> None:
        self._of: MutableMapping[torch.Tensor, RowChange] = WeakIdKeyDictionary()

    def __bool__(self) -> bool:
        """Whether any parameter has changed."""
        return len(self._of) > 0

    def __setitem__(self, model_param: torch.Tensor, change: RowChange) -> None:
        """Record a change."""
        self._of[model_param] = change

    def of(self, model_param: torch.Tensor) -> RowChange | None:
        """Return the change of a model parameter; None if its number of rows is unchanged."""
        return self._of.get(model_param)

    def clear(self) -> None:
        """Remove all changes, because no optimizer will use them."""
        self._of.clear()

    def first_new_element(self, model_param: torch.Tensor) -> int | None:
        """Find the first element of a shard that the checkpoint does not have.

        Args:
            model_param: This rank's tensor-parallel shard.

        Returns:
            Its position in the flattened shard; None if the checkpoint has all elements.
        """
        change = self.of(model_param)
        if change is None or change.first_new >= model_param.shape[0]:
            return None
        return change.first_new * (model_param.numel() // model_param.shape[0])


@dataclass
class Resized:
    """The entries of a sharded state dict whose number of rows differs from the checkpoint's.

    Args:
        changes: The change of each such model parameter on this rank.
        kept: For each entry with new rows: its path, the first new row, and the rows' values.
    """

    changes: list[RowChange] = field(default_factory=list)
    kept: list[tuple[tuple[Any, ...], int, torch.Tensor]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Format the changes as log lines."""
        return [f" > {change}" for change in self.changes]

    @torch.no_grad()
    def put_back(self, state_dict: Any) -> None:
        """Write the values of the new rows from before the load back.

        Args:
            state_dict: The result of ``dist_checkpointing.load``. Its tensors are modified in
                place.
        """
        for path, first, rows in self.kept:
            found = value_at(state_dict, path)
            found[first:] = rows.to(found)


def find_resized(
    state_dict: Any,
    sharded_tensor: Any,
    optimizer_prefix: str,
    stored: Callable[[], Mapping[str, tuple[int, ...] | None]],
    rows: RowChanges,
) -> Resized:
    """Compare a sharded state dict with the checkpoint that will fill it.

    Not collective. The checkpoint's metadata is read only if the rows of an entry may differ.

    Args:
        state_dict: The sharded state dict. It is not modified.
        sharded_tensor: Megatron's ShardedTensor class.
        optimizer_prefix: The part that every checkpoint key of the optimizer's entries contains.
        stored: Reads the checkpoint keys and the global shape of each.
        rows: The changes of model parameters are added to it.

    Returns:
        The entries whose number of rows differs, with copies of the new rows.
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
    """Return the changed rows of an optimizer's current load; None without a load."""
    load = getattr(getattr(optimizer, "resume", None), "load", None)
    return None if load is None else load.rows


def unsupported(resized: Resized, optimizer_keys: Mapping[str, Any]) -> CheckpointError | None:
    """Make the error for an optimizer state that fits only the saved number of rows, or None.

    Args:
        resized: The changed entries.
        optimizer_keys: Checkpoint keys of the optimizer's entries.
    """
    if not resized.changes or not by_bucket(optimizer_keys):
        return None
    form = "dp_reshardable" if any(".gbuf_idx_" in k for k in optimizer_keys) else "gathered"
    return refusal(resized.changes[0], f"{form}, in buckets of concatenated parameters")


def by_bucket(optimizer_keys: Mapping[str, Any]) -> bool:
    """Whether the optimizer state is stored in the order of the optimizer's buffers."""
    return any(_BY_BUCKET in key for key in optimizer_keys)


def refusal(change: RowChange, form: str) -> CheckpointError:
    """Make the error for a format whose moments cannot fit a resized vocabulary.

    Args:
        change: The change of one parameter.
        form: The format of the optimizer state.
    """
    return CheckpointError(
        f"the vocabulary has another size than in the checkpoint ({change.key}: {change.saved} "
        f"rows there, {change.now} here; padding counts, and changes with "
        "--tensor-model-parallel-size and --make-vocab-size-divisible-by), and the optimizer "
        f"state is stored as {form}: it only fits the old size. Run the old configuration, old "
        "vocabulary and old parallel sizes, for one more save with --ckpt-format torch_dist "
        "--dist-ckpt-optim-fully-reshardable, and resume from that; or pass --no-load-optim to "
        "start with a new optimizer (the Adam moments are then lost)"
    )


def _compare(entry: Any, saved: tuple[int, ...] | None) -> RowChange | None:
    """Return the change of a ShardedTensor's rows.

    None if the shape is the same, or differs in another dimension. The load itself refuses the
    latter.
    """
    axis, now = entry.prepend_axis_num, tuple(entry.global_shape)
    if saved is None or saved == now or len(saved) != len(now):
        return None
    if (*saved[:axis], *saved[axis + 1 :]) != (*now[:axis], *now[axis + 1 :]):
        return None
    rows = entry.local_shape[0]
    first_new = min(max(saved[axis] - entry.global_offset[axis], 0), rows)
    return RowChange(entry.key, saved[axis], now[axis], first_new)
