"""The result of `forecast`, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..base.text import Summary
from ..checkpoint.stored import StoredCheckpoint
from ..errors import MegatronExtError
from ..plan.decisions import ResumePlan
from ..plan.mapped import Mapped
from ..plan.resized import ResizedParameter
from ..policy.counters import Counters
from ..policy.phase import Phase
from ..policy.policy import ResumePolicy
from ..report.curves import Curve
from .moments_forecast import RuleForecast
from .planned_arguments import PlannedArguments

#: Names of the two phases.
LABELS = ("checkpoint's run", "resumed run")
Outcome = Literal["transition", "continued", "resume", "drops", "refused"]


@dataclass(frozen=True)
class OptimizerForecast:
    """The forecast for one optimizer of the chain.

    Args:
        plan: The decisions, with their warnings.
        rules: The elements that each rule covers; empty if the moments are kept, None if they
            cannot be determined offline.
        resized: Parameters whose number of rows changes.
    """

    plan: ResumePlan
    rules: tuple[RuleForecast, ...] | None
    resized: tuple[ResizedParameter, ...] = ()


@dataclass(frozen=True)
class ScheduledValue:
    """One value of the scheduler, similar to `megatron_ext.plan.decisions.Decision`."""

    checkpoint: Any
    argument: Any
    value: Any
    taken: Literal["arguments", "checkpoint"]


@dataclass(frozen=True, repr=False)
class Forecast(Summary):
    """The forecast of a resume.

    Args:
        stored: The checkpoint.
        arguments: The command line with the assumed values.
        errors: Errors for which the resume would be refused.
        policy: The user's policy; None if it cannot be read.
        phase: The phase that begins or continues; None if no optimizer is loaded.
        counters: The counters of the checkpoint and of the resumed run.
        mapped: The sources of the parameters, as far as they are known.
        optimizers: One per optimizer of the chain; empty if no optimizer is loaded.
        scheduler: The scheduler's values after the load.
        curves: Curves of the checkpoint's run up to the checkpoint, then of the resumed run.
        dropped: The flag that drops the optimizer's state, if one is given.
        warnings: Risks that the user should know, besides the plans' warnings.
        notes: Assumptions, and facts that cannot be determined offline.
    """

    stored: StoredCheckpoint
    arguments: PlannedArguments
    errors: tuple[MegatronExtError, ...] = ()
    policy: ResumePolicy | None = None
    phase: Phase | None = None
    counters: tuple[Counters, Counters] | None = None
    mapped: Mapped = field(default_factory=Mapped)
    optimizers: tuple[OptimizerForecast, ...] = ()
    scheduler: Mapping[str, ScheduledValue] = field(default_factory=dict)
    curves: tuple[Curve, ...] = ()
    dropped: str | None = None
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, object]:
        """Return what decides whether the resume is what is wanted."""
        groups = [group for one in self.optimizers for group in one.plan.groups]
        changed = (d.key for group in groups for d in group.decisions if d.changed)
        return {
            "checkpoint": self.stored.directory,
            "outcome": self.outcome,
            "changed": ", ".join(dict.fromkeys(changed)) or "nothing",
            "warnings": len(self.all_warnings),
            "errors": "; ".join(map(str, self.errors)) or "none",
        }

    @property
    def outcome(self) -> Outcome:
        """The kind of the resume."""
        if self.errors:
            return "refused"
        if self.dropped or self.phase is None:
            return "drops"
        names: dict[str, Outcome] = {"applied": "transition", "continued": "continued"}
        return names.get(self.phase.state, "resume")

    @property
    def all_warnings(self) -> tuple[str, ...]:
        """The warnings, including those of the plans, each once."""
        of_plans = (w for one in self.optimizers for w in one.plan.warnings)
        return tuple(dict.fromkeys((*self.warnings, *of_plans)))

    @property
    def status(self) -> int:
        """Exit status: 0, 1 with warnings, 2 if the resume would be refused."""
        return 2 if self.errors else int(bool(self.all_warnings))

    @property
    def first_step(self) -> tuple[tuple[Curve, float, float], ...]:
        """Curve, and learning rate and weight decay of the first step, of each param_group."""
        return tuple((c, c.lr[0], c.weight_decay[0]) for c in self.curves if c.phase == 2)
