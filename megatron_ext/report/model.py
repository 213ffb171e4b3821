"""What a resume did, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from ..base.schema import Count, Keywords
from ..plan.decisions import ResumePlan
from ..plan.resized import ResizedParameter
from .loaded import LoadedState


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
