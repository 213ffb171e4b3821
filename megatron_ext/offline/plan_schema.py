"""The JSON document of a plan, as types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypedDict

from ..base.schema import INLINE, Versioned
from ..plan.resized import ResizedParameter
from ..policy.schema import PolicyDocument
from ..report.curves import Curve
from ..report.schema_parts import (
    DecisionDocument,
    FirstStepDocument,
    GroupDocument,
    ParametersReportDocument,
    PhaseDocument,
    RunCountersDocument,
    ScheduledValueDocument,
    StepDocument,
)
from .forecast_model import Outcome
from .moments_forecast import RuleForecast
from .planned_arguments import Assumption


class CheckpointDocument(TypedDict):
    """The checkpoint that would be loaded.

    Attributes:
        directory: The iteration's own.
        iteration: Its number.
        format: torch_dist, or legacy torch.
        sharding_type: How a distributed optimizer's state is cut; null without one and for legacy
            torch.
    """

    directory: str
    iteration: int
    format: Literal["torch_dist", "torch"]
    sharding_type: str | None


class ArgumentsDocument(TypedDict):
    """The command line, and what it leaves out.

    Attributes:
        complete: Whether the command line is a run's: what it leaves out then has Megatron's
            defaults, else it comes from the checkpoint.
        parsed_by: Who has read the command line.
        assumed: What comes from the checkpoint.
        unknown: Words that no parser knows.
    """

    complete: bool
    parsed_by: str
    assumed: list[Assumption]
    unknown: list[str]


class PlannedOptimizerDocument(TypedDict):
    """What would be done to one Megatron optimizer.

    Attributes:
        step: Adam's step, the exponent in the bias correction.
        clip_grad: Gradient clipping, where a preset changes it; else null.
        groups: One entry per current param_group, in order.
        unused_saved_groups: Positions of the checkpoint's param_groups that no current param_group
            goes on from.
        rules: What each rule is for, the preset last; empty where the moments are kept, null where
            it cannot be told offline.
        resized: Parameters with another number of rows than in the checkpoint.
    """

    step: Annotated[StepDocument, INLINE]
    clip_grad: DecisionDocument | None
    groups: list[GroupDocument]
    unused_saved_groups: list[int]
    rules: list[RuleForecast] | None
    resized: list[ResizedParameter]


class PlannedSchedulerDocument(TypedDict):
    """The scheduler after the load.

    Attributes:
        num_steps: Position after the load, in samples.
        values: As in the resume report; empty where they are not known or not loaded.
        first_step: What the first step uses, for each param_group.
    """

    num_steps: int | None
    values: Mapping[str, ScheduledValueDocument]
    first_step: list[FirstStepDocument]


class PlanDocument(Versioned):
    """What a resume would do (python -m megatron_ext plan --json).

    Where a field has the name of one of the resume report, it has its meaning. Values that JSON
    does not know are text.

    Attributes:
        megatron_ext: Version of megatron_ext.
        checkpoint: The checkpoint that would be loaded.
        outcome: transition: a phase begins. continued: the checkpoint is the phase's own. resume:
            nothing is asked that must happen once. drops: the optimizer's state is not loaded.
            refused: see errors.
        errors: Everything for which the run would stop before its first step.
        warnings: What a user should look at, with the number.
        notes: What was assumed or cannot be told offline.
        arguments: The command line, and what it leaves out.
        policy: As in a policy file; null where it cannot be read.
        phase: As in the resume report.
        counters: As in the resume report.
        parameters: As in the resume report, as far as arguments tell.
        optimizers: One entry per Megatron optimizer, in the order of the chain; empty where nothing
            is loaded.
        scheduler: The scheduler after the load.
        curves: One for each param_group of the checkpoint's run, then of the resumed one.
    """

    megatron_ext: str
    checkpoint: Annotated[CheckpointDocument, INLINE]
    outcome: Outcome
    errors: list[str]
    warnings: list[str]
    notes: list[str]
    arguments: Annotated[ArgumentsDocument, INLINE]
    policy: PolicyDocument | None
    phase: PhaseDocument | None
    counters: RunCountersDocument | None
    parameters: ParametersReportDocument
    optimizers: list[PlannedOptimizerDocument]
    scheduler: PlannedSchedulerDocument
    curves: list[Curve]
