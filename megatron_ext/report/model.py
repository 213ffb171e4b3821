"""The results of a resume, as plain data."""

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
    """The results of a resume for one Megatron optimizer.

    Args:
        kind: Class names of the Megatron optimizer and of the torch optimizer inside.
        plan: The decisions.
        loaded: Counts of the tensors and elements that the load has filled, summed over all ranks.
        parameters: Number of parameters of each param_group on this rank.
        moments: Changes of the moments; None if the policy changes none.
        notes: Further warnings.
        loss_scale: The loss scale in the checkpoint and after the load; None without a dynamic one.
        resized: Parameters whose number of rows differs from the checkpoint's, on all ranks.
    """

    kind: str
    plan: ResumePlan
    loaded: LoadedState
    parameters: tuple[int, ...]
    moments: MomentReport | None = None
    notes: tuple[str, ...] = ()
    loss_scale: tuple[float, float] | None = None
    resized: tuple[ResizedParameter, ...] = ()

    @property
    def unread(self) -> Mapping[str, int]:
        """Moment -> number of elements that were overwritten without being read."""
        return {} if self.moments is None else self.moments.unread

    @property
    def read_shards(self) -> dict[str, int]:
        """State key -> number of shards with the checkpoint's values."""
        unread = {} if self.moments is None else self.moments.unread_shards
        return {k: n - unread.get(k, 0) for k, n in self.loaded.tensors.items()}

    @property
    def read_elements(self) -> dict[str, int]:
        """State key -> number of elements with the checkpoint's values."""
        return {k: n - self.unread.get(k, 0) for k, n in self.loaded.elements.items()}


@dataclass(frozen=True)
class RuleReport:
    """The effect of one rule, on all ranks.

    Args:
        rule: Its match as in the policy; the preset for elements that no rule matches.
        exp_avg: The policy's rule for the first moment.
        exp_avg_sq: The policy's rule for the second moment.
        elements: Number of elements. An element that several ranks hold counts on each.
        examples: Names of some parameters that it matches; empty for the preset.
    """

    rule: str
    exp_avg: str
    exp_avg_sq: str
    elements: Count
    examples: Annotated[tuple[str, ...], Keywords(maxItems=8)] = ()


@dataclass(frozen=True)
class MomentReport:
    """The changes of the moments of one Megatron optimizer, on all ranks.

    Args:
        rules: One report for each rule, and one for the preset.
        rms: Root mean square of each moment, by its tensor, before and after.
        changed: Number of elements of each moment whose value differs from before.
        nonfinite: Number of elements of each moment that cannot be used after: NaN, infinite, or
            negative in a second moment.
        unread: Number of elements of each moment that were not read, because they are overwritten.
            The root mean square before and the number of changes do not include them.
        unread_shards: Number of shards of each moment that these elements are in.
        norms_on_this_rank: Euclidean norm of each moment after, on this rank.
        warnings: A warning about rules that match nothing.
    """

    rules: tuple[RuleReport, ...]
    rms: Mapping[str, tuple[float | None, float]] = field(default_factory=dict)
    changed: Mapping[str, int] = field(default_factory=dict)
    nonfinite: Mapping[str, int] = field(default_factory=dict)
    unread: Mapping[str, int] = field(default_factory=dict)
    unread_shards: Mapping[str, int] = field(default_factory=dict)
    norms_on_this_rank: tuple[float, ...] = (0.0, 0.0)
    warnings: tuple[str, ...] = ()
