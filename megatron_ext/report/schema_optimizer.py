"""Types of one optimizer's part of a resume's report."""

from __future__ import annotations

from typing import Annotated, TypedDict

from ..base.schema import INLINE, Count, Keywords
from .model import RuleReport
from .schema_parts import DecisionDocument, GroupDocument, StepDocument
from .schema_state import PerMoment, PerStateTensor


class LoadedDocument(TypedDict):
    """Counts of optimizer tensors that were loaded from the checkpoint, summed over all ranks.

    Moments that are overwritten without being read do not count; see ``unread`` in ``moments``.

    Attributes:
        tensors: Number of shards, by state tensor.
        elements: Number of elements in these shards, by state tensor.
        new: Number of elements that are not from the checkpoint, by state tensor.
        proven: Number of elements of the master weights that round to the weights that the model
            has loaded. Quantized weights and those without a master are not compared.
    """

    tensors: PerStateTensor
    elements: PerStateTensor
    new: PerStateTensor
    proven: Count


class ResizedDocument(TypedDict):
    """One unsharded parameter whose number of rows differs from the checkpoint's.

    The numbers of rows include padding.

    Attributes:
        parameter: Global name.
        checkpoint_rows: Number of rows in the checkpoint.
        rows: Number of rows in the model.
        new_rows: Number of rows that only the model has. Their weights stay as initialised, and
            their moments are 0 before the policy's rules.
        dropped_rows: Number of rows that only the checkpoint has. They are not loaded.
    """

    parameter: str
    checkpoint_rows: Count
    rows: Count
    new_rows: Count
    dropped_rows: Count


class ReportedGroupDocument(GroupDocument):
    """The decisions for one current param_group.

    Attributes:
        parameters_on_rank_0: Number of parameters (or of their shards) in the group on rank 0.
    """

    parameters_on_rank_0: Count


class MomentsDocument(TypedDict):
    """The changes of the moments, on all ranks.

    An element that several ranks hold counts on each.

    Attributes:
        rules: The policy's rules in order, then its preset for elements that no rule matches.
        state: Statistics of each moment over all elements.
    """

    rules: list[RuleReport]
    state: PerMoment


class LossScaleDocument(TypedDict):
    """The loss scale.

    Attributes:
        checkpoint: The loss scale in the checkpoint.
        value: The loss scale after the load.
    """

    checkpoint: float
    value: float


class OptimizerDocument(TypedDict):
    """The results of a resume for one Megatron optimizer.

    Attributes:
        kind: Class names of the Megatron optimizer and of the torch optimizer inside, as "A over
            B".
        plan_digest: SHA-256 of all decisions in hexadecimal digits; the same on every rank.
        step: The step, the exponent in the bias correction; null values for an optimizer without
            one.
        loaded: Counts of optimizer tensors that were loaded from the checkpoint, summed over all
            ranks. Replicas count on each rank that holds them.
        resized: Parameters whose number of rows differs from the checkpoint's, because the
            vocabulary has another size.
        unused_saved_groups: Positions of the checkpoint's param_groups that correspond to no
            current one.
        groups: One entry per current param_group, in order.
        moments: Changes of the moments; null if the policy changes none.
        loss_scale: The loss scale of fp16; null without a dynamic one.
        clip_grad: Gradient clipping if a preset changes it, else null.
        warnings: Warnings, with the size of the effect.
    """

    kind: str
    plan_digest: Annotated[str, Keywords(pattern="^[0-9a-f]{64}$")]
    step: Annotated[StepDocument, INLINE]
    loaded: Annotated[LoadedDocument, INLINE]
    resized: list[ResizedDocument]
    unused_saved_groups: Annotated[list[Count], Keywords(uniqueItems=True)]
    groups: list[ReportedGroupDocument]
    moments: MomentsDocument | None
    loss_scale: LossScaleDocument | None
    clip_grad: DecisionDocument | None
    warnings: list[str]
