"""Types that the documents of a resume's report and of a plan share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from ..base.schema import INLINE, Count, Keywords
from ..plan.decisions import Source
from ..plan.mapped import CopiedParameter, LeftParameter, NewParameter

_WHAT_VALUES_ARE = (
    "A hyperparameter as JSON: null where that side has none, a list for a tuple such as betas, "
    'the strings "inf", "-inf" and "nan" for floats that JSON lacks, Python\'s repr for anything '
    "else. Learning rates, weight decay, eps, betas and multipliers are dimensionless."
)
Value = Annotated[
    Any,
    Keywords(
        "value",
        description=_WHAT_VALUES_ARE,
        type=["null", "boolean", "number", "string", "array"],
        items={"$ref": "#/$defs/value"},
    ),
]


class ParametersReportDocument(TypedDict):
    """The parameters that differ between the checkpoint and the model.

    Attributes:
        new: Those of which the checkpoint lacks something.
        copied: Those that take their state from another parameter of the checkpoint.
        left: Those of the checkpoint whose moments are not used.
    """

    new: list[Annotated[NewParameter, INLINE]]
    copied: list[Annotated[CopiedParameter, INLINE]]
    left: list[Annotated[LeftParameter, INLINE]]


class StepDocument(TypedDict):
    """Adam's step, the exponent in the bias correction.

    Attributes:
        value: The step after the resume; null if none was taken yet.
        checkpoint: The checkpoint's step; null if none was taken yet.
        taken: checkpoint if the step is the saved one, policy if it was reset or set.
    """

    value: Count | None
    checkpoint: Count | None
    taken: Literal["checkpoint", "policy"]


class ScheduledValueDocument(TypedDict):
    """The source and value of one attribute of the scheduler.

    Attributes:
        checkpoint: The saved value; null if the checkpoint has none.
        argument: The value of the current arguments.
        value: The value that is used.
        taken: The source that is used.
    """

    checkpoint: Value
    argument: Value
    value: Value
    taken: Source


class DecisionDocument(TypedDict):
    """The source and value of one key of one param_group.

    Attributes:
        checkpoint: The saved value; null if the checkpoint has none.
        argument: The current value; null if the current group has none.
        value: The value that is used.
        taken: The source that is used; preset if a preset computes the value from the argument.
        changed: Whether the value differs from the saved one.
        reason: The reason in one phrase, such as default or the flag that decided.
    """

    checkpoint: Value
    argument: Value
    value: Value
    taken: Source
    changed: bool
    reason: str


class GroupDocument(TypedDict):
    """The decisions for one current param_group.

    Attributes:
        index: Position among the current optimizer's param_groups, from 0.
        saved_index: Position of its counterpart in the checkpoint; null without one.
        note: How the counterpart was found, or why there is none.
        dropped_keys: Keys of the counterpart that the current param_group neither has nor gets.
        keys: One decision per key of the param_group, without params and step.
    """

    index: Count
    saved_index: Count | None
    note: str
    dropped_keys: Annotated[list[str], Keywords(uniqueItems=True)]
    keys: Annotated[
        Mapping[str, DecisionDocument],
        Keywords(propertyNames={"not": {"enum": ["params", "step"]}}),
    ]


_From = TypedDict("_From", {"from": str | None})


class PhaseDocument(_From):
    """The phase of a resume.

    Attributes:
        state: applied if the phase begins here; continued if the checkpoint belongs to the phase,
            so that no one-time operation was repeated; none if none was requested.
        why: The reason in one sentence.
        name: Name of the phase in later checkpoints; empty if it has no name, null outside of any
            phase.
        from: The checkpoint from which the phase started, as name, iteration and digest.
        checkpoint: The loaded checkpoint, as name, iteration and digest; null if it has none.
        operations: The one-time operations that were requested.
        digest: Digest of the operations of the phase.
    """

    state: Literal["none", "applied", "continued"]
    why: str
    name: str | None
    checkpoint: str | None
    operations: list[str]
    digest: str | None


class CounterDocument(TypedDict):
    """One counter.

    Attributes:
        checkpoint: The value in the checkpoint; null if it has none.
        value: The value after the load.
    """

    checkpoint: int | None
    value: int | None


class RunCountersDocument(TypedDict):
    """The counters of the run.

    Attributes:
        iteration: Training iterations done.
        consumed_train_samples: Data position, in samples.
        skipped_train_samples: Number of these samples that were skipped.
        consumed_valid_samples: Position in the validation data, in samples.
        num_steps: Position of the schedule, in samples.
    """

    iteration: CounterDocument
    consumed_train_samples: CounterDocument
    skipped_train_samples: CounterDocument
    consumed_valid_samples: CounterDocument
    num_steps: CounterDocument


class FirstStepDocument(TypedDict):
    """The first resumed step of one param_group.

    Attributes:
        optimizer: Position of the optimizer in the chain, from 0.
        group: Position of the param_group in that optimizer, from 0.
        lr: Learning rate, dimensionless.
        weight_decay: Weight decay, dimensionless.
    """

    optimizer: Count
    group: Count
    lr: Annotated[float, Keywords(minimum=0)]
    weight_decay: float
