"""What `forecast` finds out, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..checkpoint.stored import StoredCheckpoint
from ..errors import MegatronExtError
from ..plan.decisions import ResumePlan
from ..plan.resized import ResizedParameter
from ..policy.counters import Counters
from ..policy.phase import Phase
from ..policy.policy import ResumePolicy
from ..report.curves import Curve
from .moments_forecast import RuleForecast
from .planned_arguments import PlannedArguments

#: What the two phases are called.
LABELS = ("checkpoint's run", "resumed run")
Outcome = Literal["transition", "continued", "resume", "drops", "refused"]


@dataclass(frozen=True)
class OptimizerForecast:
    """What is done to one optimizer of the chain.

    Args:
        plan: The decisions, with their warnings.
        rules: What the rules are for; empty where the moments are kept, None where it cannot be
            told offline.
        resized: Parameters with another number of rows.
    """

    plan: ResumePlan
    rules: tuple[RuleForecast, ...] | None
    resized: tuple[ResizedParameter, ...] = ()


@dataclass(frozen=True)
class ScheduledValue:
    """One value of the scheduler, as `megatron_ext.plan.decisions.Decision` has those of groups."""

    checkpoint: Any
    argument: Any
    value: Any
    taken: Literal["arguments", "checkpoint"]


@dataclass(frozen=True)
class Forecast:
    """What a resume would do.

    Args:
        stored: The checkpoint.
        arguments: The command line, and what was assumed.
        errors: Everything for which the resume would be refused.
        policy: What is asked; None where that cannot be read.
        phase: Whether a phase begins or goes on; None where nothing is loaded.
        counters: The checkpoint's, and those the run goes on with.
        optimizers: One for each optimizer of the chain; empty where nothing is loaded.
        scheduler: The scheduler's values after the load.
        curves: Of the checkpoint's run up to the checkpoint, then of the resumed run.
        dropped: The flag with which the optimizer's state is dropped, if one is given.
        warnings: What a user should look at, beside the plans' warnings.
        notes: What was assumed or cannot be told offline.
    """

    stored: StoredCheckpoint
    arguments: PlannedArguments
    errors: tuple[MegatronExtError, ...] = ()
    policy: ResumePolicy | None = None
    phase: Phase | None = None
    counters: tuple[Counters, Counters] | None = None
    optimizers: tuple[OptimizerForecast, ...] = ()
    scheduler: Mapping[str, ScheduledValue] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    dropped: str | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def outcome(self) -> Outcome:
        """What the resume is."""
        if self.errors:
            return "refused"
        if self.dropped or self.phase is None:
            return "drops"
        names: dict[str, Outcome] = {"applied": "transition", "continued": "continued"}
        return names.get(self.phase.state, "resume")

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """Those of the plans too, each once."""
        of_plans = (w for one in self.optimizers for w in one.plan.warnings)
        return tuple(dict.fromkeys((*self.warnings, *of_plans)))

    @property
    def status(self) -> int:
        """Exit status: 0, 1 with warnings, 2 where the resume would be refused."""
        return 2 if self.errors else int(bool(self.all_warnings))

    @property
    def first_step(self) -> tuple[tuple[Curve, float, float], ...]:
        """For each param_group its curve, and learning rate and weight decay of the first step."""
        return tuple((c, c.lr[0], c.weight_decay[0]) for c in self.curves if c.phase == 2)
