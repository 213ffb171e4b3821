"""Count the tensors that a load restores, so that a load without moments raises."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..base import ranks
from ..errors import CheckpointError
from ..host.optimizers import ADAM, OptimizerState


@dataclass
class LoadedState:
    """Counts of loaded tensors and elements, by state key.

    Args:
        tensors: State key -> number of shards written on this rank, or on all ranks after `summed`.
        elements: State key -> number of elements in these shards.
        made: State key -> number of elements that are new: no checkpoint value is used for them.
        nonfinite: Number of elements of the moments that cannot be used: NaN, infinite, or negative
            in a second moment.
        proven: Number of elements of the master weights that are the model's weights.
        differing: Number of elements of the master weights that are not.
        masters: Number of elements that are master weights and no remainders
            (`megatron_ext.resume.precision`).
        remainders: Number of elements that were taken for remainders.
        keys: The keys to count: ``param``, the moments, and ``state`` for other tensors.
    """

    tensors: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    nonfinite: int = 0
    proven: int = 0
    differing: int = 0
    masters: int = 0
    remainders: int = 0
    keys: tuple[str, ...] = ("param", *ADAM.tensors)

    @classmethod
    def of(cls, optimizer: OptimizerState) -> LoadedState:
        """Make empty counts for the state of an optimizer."""
        others = ("state",) if optimizer.others else ()
        return cls(keys=("param", *optimizer.tensors, *others))

    def add(self, tensors: Mapping[str, Any], made: Collection[str] = ()) -> None:
        """Count the tensors of one parameter shard: ``param`` and the moments, but not ``step``.

        Args:
            tensors: State key -> tensor.
            made: The keys of new tensors, which are not from the checkpoint.
        """
        for key, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and key in made:
                self.made[key] = self.made.get(key, 0) + tensor.numel()
            elif isinstance(tensor, torch.Tensor) and key != "step":
                key = key if key in self.keys or "state" not in self.keys else "state"
                self.tensors[key] = self.tensors.get(key, 0) + 1
                self.elements[key] = self.elements.get(key, 0) + tensor.numel()

    def summed(self) -> LoadedState:
        """Sum the counts over all ranks; collective over the default process group.

        Replicas (tensor-parallel duplicates, ranks of a non-distributed optimizer) count on each
        rank that holds them.
        """
        keys, n = self.keys, len(self.keys)
        counts = (self.tensors, self.elements, self.made)
        flat = [of_kind.get(key, 0) for of_kind in counts for key in keys]
        others = (self.nonfinite, self.proven, self.differing, self.masters, self.remainders)
        sums = ranks.total([*flat, *others])
        return LoadedState(
            tensors=dict(zip(keys, sums[:n], strict=True)),
            elements=dict(zip(keys, sums[n : 2 * n], strict=True)),
            made=dict(zip(keys, sums[2 * n : 3 * n], strict=True)),
            nonfinite=sums[-5],
            proven=sums[-4],
            differing=sums[-3],
            masters=sums[-2],
            remainders=sums[-1],
            keys=keys,
        )

    def require_moments(self) -> None:
        """Raise if a moment was not loaded on any rank.

        Raises:
            CheckpointError: A moment has no loaded element on any rank.
        """
        missing = [k for k in self.keys[1:] if not self.elements.get(k) and not self.made.get(k)]
        if missing:
            raise CheckpointError(
                f"no element of {' and '.join(missing)} was loaded on any rank, but the policy "
                "keeps the moments: the checkpoint holds none, or its format is not read by this "
                "optimizer. Pass --no-load-optim to start with a new optimizer (the Adam moments "
                "are then lost)"
            )
