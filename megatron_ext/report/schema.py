"""The JSON document of a resume's report, as types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypedDict

from ..base.schema import Count, Keywords, Versioned
from ..policy.schema import PolicyDocument
from .schema_optimizer import OptimizerDocument
from .schema_parts import (
    CounterDocument,
    FirstStepDocument,
    PhaseDocument,
    RunCountersDocument,
    ScheduledValueDocument,
)


class EnvironmentDocument(TypedDict):
    """Where and when the resume was done.

    Attributes:
        python: Version of Python.
        torch: Version of torch.
        ranks: Number of ranks of the job.
        time: When the moments were in place: ISO 8601, in UTC.
    """

    python: str
    torch: str
    ranks: Annotated[int, Keywords(minimum=1)]
    time: str


class LengthDocument(TypedDict):
    """Where the run ends and what an iteration takes.

    Attributes:
        train_iters: Iteration at which the run ends; null where Megatron's training loop does not
            run.
        global_batch_size: Samples of an iteration: the checkpoint's run and this one; null where it
            is not known or not constant.
    """

    train_iters: Count | None
    global_batch_size: CounterDocument


class SchedulerDocument(LengthDocument):
    """The scheduler after its state was loaded.

    Attributes:
        num_steps: Its position, in samples (iterations times global batch size).
        values: Its attributes by name. Attributes that end in _steps are in samples, learning rates
            and weight decay are dimensionless, styles are names.
        first_step: What the first resumed step uses, per optimizer and param_group.
    """

    num_steps: Count
    values: Mapping[str, ScheduledValueDocument]
    first_step: list[FirstStepDocument]


class ReportDocument(Versioned):
    """What one resume did to every optimizer of a run and to its scheduler.

    It is resume-report.json, written by rank 0.

    Attributes:
        megatron_ext: Version of megatron_ext that did the resume.
        megatron_core: Version of megatron-core that the run used.
        environment: Where and when the resume was done; null of a live optimizer.
        policy: What was asked for; null if no optimizer took part.
        phase: Whether a phase begins here or goes on; null if no optimizer took part, or of a live
            optimizer.
        counters: Where the run was and where it goes on; null where Megatron's training loop did
            not load.
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
    optimizers: list[OptimizerDocument]
    scheduler: SchedulerDocument | None
