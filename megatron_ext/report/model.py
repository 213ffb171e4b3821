"""What a resume did, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch

from ..base import ranks
from ..base.schema import Count, Keywords
from ..checkpoint.state import MOMENT_KEYS
from ..errors import CheckpointError
from ..plan.decisions import ResumePlan
from ..plan.resized import ResizedParameter


@dataclass
class LoadedState:
    """Counts of loaded tensors and elements, by state key.

    Args:
        tensors: State key -> number of shards written on this rank (after `summed`: on all).
        elements: State key -> number of elements in them.
        nonfinite: Elements of the moments that are NaN or infinite.
        keys: What has to arrive; of an optimizer that is not Adam all but ``param`` is ``state``.
    """

    tensors: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    nonfinite: int = 0
    keys: tuple[str, ...] = ("param", *MOMENT_KEYS)

    def add(self, tensors: Mapping[str, Any]) -> None:
        """Count the tensors of one parameter shard (``param`` and the moments; not ``step``)."""
        for key, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and key != "step":
                key = key if key in self.keys or "state" not in self.keys else "state"
                self.tensors[key] = self.tensors.get(key, 0) + 1
                self.elements[key] = self.elements.get(key, 0) + tensor.numel()

    def summed(self) -> LoadedState:
        """The counts summed over all ranks; collective over the default process group.

        Replicas (tensor-parallel duplicates, ranks of a non-distributed optimizer) count on each
        rank that holds them.
        """
        keys, n = self.keys, len(self.keys)
        flat = [self.tensors.get(k, 0) for k in keys] + [self.elements.get(k, 0) for k in keys]
        sums = ranks.total([*flat, self.nonfinite])
        return LoadedState(
            tensors=dict(zip(keys, sums[:n], strict=True)),
            elements=dict(zip(keys, sums[n:-1], strict=True)),
            nonfinite=sums[-1],
            keys=keys,
        )

    def require_moments(self) -> None:
        """Raise where moments were to be kept and none arrived.

        Raises:
            CheckpointError: A moment has no element on any rank.
        """
        missing = [k for k in self.keys[1:] if not self.elements.get(k)]
        if missing:
            raise CheckpointError(
                f"no element of {' and '.join(missing)} was loaded on any rank, but the moments "
                "were to be kept: the checkpoint holds none, or its format is not read by this "
                "optimizer. Pass --no-load-optim to start with a new optimizer (the Adam moments "
                "are then lost)"
            )


@dataclass(frozen=True)
class OptimizerReport:
    """What was done to one Megatron optimizer.

    Args:
        kind: Class name of the Megatron optimizer and of the torch optimizer inside.
        plan: The decisions.
        loaded: Tensors and elements brought back, summed over all ranks.
        parameters: For each param_group the number of parameters on rank 0.
        moments: What was done to the moments; None where they are kept as they are.
        notes: What else there is to say.
        loss_scale: The checkpoint's and the one that goes on; None without a dynamic one.
        resized: Parameters with another number of rows than in the checkpoint, on all ranks.
    """

    kind: str
    plan: ResumePlan
    loaded: LoadedState
    parameters: tuple[int, ...]
    moments: MomentReport | None = None
    notes: tuple[str, ...] = ()
    loss_scale: tuple[float, float] | None = None
    resized: tuple[ResizedParameter, ...] = ()


@dataclass(frozen=True)
class RuleReport:
    """What one rule did, on all ranks.

    Args:
        rule: What it matches, as the policy has it; the preset for the elements that no rule names.
        exp_avg: What was done to exp_avg.
        exp_avg_sq: What was done to exp_avg_sq.
        elements: Number of elements; one that several ranks hold counts on each.
        examples: Some of the parameters that it matches, by name; none for the preset.
    """

    rule: str
    exp_avg: str
    exp_avg_sq: str
    elements: Count
    examples: Annotated[tuple[str, ...], Keywords(maxItems=8)] = ()


@dataclass(frozen=True)
class MomentReport:
    """What was done to the moments of one Megatron optimizer, on all ranks.

    Args:
        rules: One each, and one for the preset.
        rms: For each moment its root mean square before and after.
        changed: For each moment the number of elements with another value than before.
        nonfinite: For each moment the number of NaN and infinite elements after.
        unread: For each moment the number of elements that were not read, because they are
            overwritten; the root mean square before and the number of changes are of the others.
        norms_on_this_rank: Euclidean norms of exp_avg and exp_avg_sq after.
        warnings: Rules that match nothing.
    """

    rules: tuple[RuleReport, ...]
    rms: Mapping[str, tuple[float | None, float]] = field(default_factory=dict)
    changed: Mapping[str, int] = field(default_factory=dict)
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    unread: Mapping[str, int] = field(default_factory=dict)
    norms_on_this_rank: tuple[float, float] = (0.0, 0.0)
    warnings: tuple[str, ...] = ()
