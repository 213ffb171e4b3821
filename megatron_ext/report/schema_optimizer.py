"""What a resume's report says of one optimizer, as types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypedDict

from ..base.schema import INLINE, Count, Keywords
from .model import RuleReport
from .schema_parts import DecisionDocument, GroupDocument, StepDocument, Value


class AdamTensorsDocument(TypedDict):
    """Of Adam.

    Attributes:
        param: The fp32 master weights.
        exp_avg: The first moments.
        exp_avg_sq: The second moments.
    """

    param: Count
    exp_avg: Count
    exp_avg_sq: Count


class OtherTensorsDocument(TypedDict):
    """Of an optimizer that is not Adam.

    Attributes:
        param: The fp32 master weights.
        state: All of its state.
    """

    param: Count
    state: Count


class NothingLoadedDocument(TypedDict):
    """Nothing was loaded: the state is that of the running optimizer."""


_PerStateTensor = Annotated[
    Mapping[str, int],
    Keywords(
        "per_state_tensor",
        of=AdamTensorsDocument | OtherTensorsDocument | NothingLoadedDocument,
        description="One number for each tensor of the optimizer's state.",
    ),
]


class LoadedDocument(TypedDict):
    """Optimizer tensors brought back from the checkpoint, summed over all ranks.

    Attributes:
        tensors: Number of shards, by state tensor.
        elements: Number of elements in these shards, by state tensor.
    """

    tensors: _PerStateTensor
    elements: _PerStateTensor


class ResizedDocument(TypedDict):
    """One parameter with another number of rows, unsharded; padding rows count.

    Attributes:
        parameter: Global name.
        checkpoint_rows: Rows that the checkpoint has.
        rows: Rows that the model has.
        new_rows: Rows from checkpoint_rows on: their weights stay as initialised; their moments are
            0 before the policy's rules.
        dropped_rows: Rows of the checkpoint from rows on, which are not loaded.
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


class MomentStateDocument(TypedDict):
    """One moment, over all ranks.

    Attributes:
        rms_before: Root mean square before, of the elements that were read; null if none was.
        rms_after: And after.
        changed: Elements with another value than before, of those that were read.
        nonfinite: NaN and infinite elements after.
        unread: Elements that were not read from the checkpoint, because all of their parameter are
            overwritten.
    """

    rms_before: Value
    rms_after: Value
    changed: Count
    nonfinite: Count
    unread: Count


class BothMomentsDocument(TypedDict):
    """Each moment as a whole.

    Attributes:
        exp_avg: The first moments.
        exp_avg_sq: The second moments.
    """

    exp_avg: MomentStateDocument
    exp_avg_sq: MomentStateDocument


class MomentsDocument(TypedDict):
    """What was done to the moments, on all ranks.

    An element that several ranks hold counts on each.

    Attributes:
        rules: The policy's rules in order, then its preset for the elements that no rule names.
        state: Each moment as a whole.
    """

    rules: list[RuleReport]
    state: Annotated[Mapping[str, MomentStateDocument], INLINE, Keywords(of=BothMomentsDocument)]


class LossScaleDocument(TypedDict):
    """The loss scale.

    Attributes:
        checkpoint: In the checkpoint.
        value: What the run goes on with.
    """

    checkpoint: float
    value: float


class OptimizerDocument(TypedDict):
    """What was done to one Megatron optimizer.

    Attributes:
        kind: Class name of the Megatron optimizer and of the torch optimizer inside, as "A over B".
        plan_digest: SHA-256 of all decisions in hexadecimal digits; the same on every rank.
        step: Adam's step, the exponent in the bias correction.
        loaded: Optimizer tensors brought back from the checkpoint, summed over all ranks. Replicas
            count on each rank that holds them.
        resized: Parameters with another number of rows than in the checkpoint: a vocabulary of
            another size.
        unused_saved_groups: Positions of the checkpoint's param_groups that no current param_group
            goes on from.
        groups: One entry per current param_group, in order.
        moments: What was done to exp_avg and exp_avg_sq; null where all are kept.
        loss_scale: fp16's loss scale; null without a dynamic one.
        clip_grad: Gradient clipping, where a preset changes it; else null.
        warnings: What a user should look at, with the number.
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
