"""What the documents of a resume's report and of a plan have in common, as types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypedDict

from ..base.schema import Count, Keywords
from ..plan.decisions import Source

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


class StepDocument(TypedDict):
    """Adam's step, the exponent in the bias correction.

    Attributes:
        value: Optimizer steps that the resume goes on from; null if none was taken yet.
        checkpoint: The checkpoint's step; null if none was taken yet.
        taken: checkpoint: as it was. policy: reset or set.
    """

    value: Count | None
    checkpoint: Count | None
    taken: Literal["checkpoint", "policy"]


class ScheduledValueDocument(TypedDict):
    """Where one attribute of the scheduler comes from.

    Attributes:
        checkpoint: The saved value; null where the checkpoint has none.
        argument: The value that the current arguments give.
        value: The value that is used.
        taken: Which of the two it is.
    """

    checkpoint: Value
    argument: Value
    value: Value
    taken: Source


class DecisionDocument(TypedDict):
    """Where one value of one param_group comes from.

    Attributes:
        checkpoint: The saved value; null where the checkpoint has none.
        argument: The current value; null where the current group has none.
        value: The value that is used.
        taken: Which it is: that of the arguments, that of the checkpoint, or what a preset makes of
            the argument.
        changed: Whether the value differs from the saved one.
        reason: Why it was taken: default, or the flag that asked for it and what came of it.
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
        saved_index: Position of the checkpoint's param_group that it goes on from; null if there is
            none.
        note: How that param_group was found, or why there is none.
        dropped_keys: Keys that only the checkpoint's param_group has and that are not used.
        keys: One decision per key of the param_group (without params and step).
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
    """What a resume is, with regard to phases.

    Attributes:
        state: applied: the phase begins here. continued: the checkpoint is the phase's own, and
            nothing that must happen once was done again. none: no such thing was asked for.
        why: In one sentence.
        name: Name of the phase that the checkpoints to come carry; empty without one, null outside
            of any phase.
        from: The checkpoint that phase started from: name, iteration and digest.
        checkpoint: The checkpoint that was loaded: name, iteration and digest; null where it has
            none.
        operations: What was asked for that must not be done twice.
        digest: Digest of the operations of that phase.
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
        checkpoint: In the checkpoint; null where it has none.
        value: What the run goes on with.
    """

    checkpoint: int | None
    value: int | None


class RunCountersDocument(TypedDict):
    """The counters of the run.

    Attributes:
        iteration: Training iterations done.
        consumed_train_samples: Data position, in samples.
        skipped_train_samples: Of these, how many were skipped.
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
