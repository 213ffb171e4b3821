"""Types of the JSON document of a resume's report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypedDict

from ..base.schema import Count, Keywords, Versioned
from ..policy.schema import PolicyDocument
from .schema_optimizer import OptimizerDocument
from .schema_parts import (
    CounterDocument,
    FirstStepDocument,
    ParametersReportDocument,
    PhaseDocument,
    RunCountersDocument,
    ScheduledValueDocument,
)


class EnvironmentDocument(TypedDict):
    """The environment and the time of the resume.

    Attributes:
        python: Version of Python.
        torch: Version of torch.
        ranks: Number of ranks of the job.
        time: Time at which all optimizers were loaded, in ISO 8601 and UTC.
    """

    python: str
    torch: str
    ranks: Annotated[int, Keywords(minimum=1)]
    time: str


class LengthDocument(TypedDict):
    """The length of the run and its batch size.

    Attributes:
        train_iters: Iteration at which the run ends; null without Megatron's training loop.
        global_batch_size: Samples per iteration in the checkpoint's run and in this one; null if
            the number is unknown or not constant.
    """

    train_iters: Count | None
    global_batch_size: CounterDocument


class SchedulerDocument(LengthDocument):
    """The scheduler after its state was loaded.

    Attributes:
        num_steps: Its position, in samples (iterations times global batch size).
        values: Its attributes by name. Attributes that end in _steps are in samples, learning rates
            and weight decay are dimensionless, styles are names.
        first_step: Values of the first resumed step, per optimizer and param_group.
    """

    num_steps: Count
    values: Mapping[str, ScheduledValueDocument]
    first_step: list[FirstStepDocument]


class ReportDocument(Versioned):
    """The results of one resume for every optimizer of a run and for its scheduler.

    Rank 0 writes it to resume-report.json.

    Attributes:
        megatron_ext: Version of megatron_ext.
        megatron_core: Version of megatron-core.
        environment: The environment and the time of the resume; null for a live optimizer.
        policy: The user's policy; null if no optimizer took part.
        phase: The phase that begins or continues; null if no optimizer took part, or for a live
            optimizer.
        counters: The counters in the checkpoint and after the load; null without Megatron's
            training loop.
        parameters: The parameters that differ between the checkpoint and the model.
        optimizers: One entry per Megatron optimizer, in the order of the chain.
        scheduler: The learning rate and weight decay scheduler after its state was loaded; null
            until then.
    """

    megatron_ext: str
    megatron_core: str
    environment: EnvironmentDocument | None
    policy: PolicyDocument | None
    phase: PhaseDocument | None
    counters: RunCountersDocument | None
    parameters: ParametersReportDocument
    optimizers: list[OptimizerDocument]
    scheduler: SchedulerDocument | None
