"""The optimizer tensors on this rank: what of them a resume has brought back.

`LoadedState` counts every tensor that reaches an optimizer's own storage, so that a resume that
kept nothing cannot pass for one that kept the moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import agree
from .errors import CheckpointError

#: The tensors of Adam's state; `param` is Megatron's name for the fp32 master weight.
MOMENT_KEYS = ("exp_avg", "exp_avg_sq")


@dataclass
class LoadedState:
    """Counts of loaded tensors and elements, by state key.

    Args:
        tensors: State key -> number of shards written on this rank (after `summed`: on all).
        elements: State key -> number of elements in them.
    """

    tensors: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)

    def add(self, tensors: Mapping[str, Any]) -> None:
        """Count the tensors of one parameter shard (``param`` and the moments; not ``step``)."""
        for key, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and key != "step":
                self.tensors[key] = self.tensors.get(key, 0) + 1
                self.elements[key] = self.elements.get(key, 0) + tensor.numel()

    def summed(self) -> LoadedState:
        """The counts summed over all ranks; collective over the default process group.

        Replicas (tensor-parallel duplicates, ranks of a non-distributed optimizer) count on each
        rank that holds them.
        """
        keys = ("param", *MOMENT_KEYS)
        flat = [self.tensors.get(k, 0) for k in keys] + [self.elements.get(k, 0) for k in keys]
        sums = agree.total(flat)
        n = len(keys)
        return LoadedState(
            tensors=dict(zip(keys, sums[:n], strict=True)),
            elements=dict(zip(keys, sums[n:], strict=True)),
        )

    def require_moments(self) -> None:
        """Raise where moments were to be kept and none arrived.

        Raises:
            CheckpointError: A moment has no element on any rank.
        """
        missing = [k for k in MOMENT_KEYS if not self.elements.get(k)]
        if missing:
            raise CheckpointError(
                f"no element of {' and '.join(missing)} was loaded on any rank, but the moments "
                "were to be kept: the checkpoint holds none, or its format is not read by this "
                "optimizer. Pass --no-load-optim to start with a new optimizer (the Adam moments "
                "are then lost)"
            )
