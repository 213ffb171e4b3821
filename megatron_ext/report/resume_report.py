"""The report of one resume of one run, as log lines and as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..base.text import Summary
from ..plan.jumps import jumps
from ..plan.mapped import Mapped
from ..policy.counters import Counters, begin
from ..policy.phase import Mark, Phase
from ..policy.policy import ResumePolicy
from ..version import __version__
from .document import (
    counters_json,
    optimizer_json,
    parameters_json,
    phase_json,
    policy_json,
)
from .log_lines import counter_lines, optimizer_lines, parameter_lines, phase_lines
from .model import OptimizerReport
from .schema import EnvironmentDocument, ReportDocument, SchedulerDocument

SCHEMA = "megatron_ext/resume-report/1"


@dataclass(repr=False)
class ResumeReport(Summary):
    """The results of one resume, over all optimizers of the run.

    Args:
        megatron: Version of megatron-core.
        optimizers: One report per Megatron optimizer, in the order of the chain.
        scheduler: Values after the scheduler was loaded: the first resumed step's lr and weight
            decay per group, ``num_steps`` in samples, and the source of every attribute.
        counters: The counters in the checkpoint and after the load; None without Megatron's
            training loop.
        mapped: The sources of the parameters.
        environment: Versions of Python and torch, number of ranks and time; None for a live
            optimizer.
    """

    megatron: str
    optimizers: list[OptimizerReport] = field(default_factory=list)
    scheduler: SchedulerDocument | None = None
    counters: tuple[Counters, Counters] | None = None
    environment: EnvironmentDocument | None = None
    mapped: Mapped = field(default_factory=Mapped)

    @property
    def phase(self) -> Phase | None:
        """The phase that begins or continues."""
        return self.optimizers[0].plan.phase if self.optimizers else None

    def summary(self) -> dict[str, object]:
        """Return the most important results."""
        return {
            "phase": "none" if self.phase is None else self.phase.state,
            "optimizers": ", ".join(one.kind for one in self.optimizers) or "none",
            "steps": ", ".join(str(one.plan.step) for one in self.optimizers) or "none",
            "warnings": sum(len(one.plan.warnings) for one in self.optimizers),
        }

    def lines(self, rank: int = 0) -> list[str]:
        """Format the report as log lines.

        Args:
            rank: The rank on which the parameters were counted.
        """
        out = [*phase_lines(self.phase), *self.counter_lines()]
        out += parameter_lines(self.mapped)
        for number, report in enumerate(self.optimizers):
            out += optimizer_lines(number, len(self.optimizers), report, rank)
        return out

    def count_from(self, before: Counters) -> Mark | None:
        """Set the counters of a phase whose training loop has asked for them after the load.

        Args:
            before: The checkpoint's counters.

        Returns:
            The phase's mark, with the offset of the new counters; None without a phase.
        """
        phase = self.phase
        mark = None if phase is None else phase.mark
        policy = ResumePolicy() if phase is None else phase.policy
        after, offset = begin(policy, before, 0 if mark is None else mark.offset)
        self.counters = before, after
        if phase is None or mark is None:
            return None
        phase = phase.at(offset)
        self.optimizers = [
            replace(report, plan=replace(report.plan, phase=phase)) for report in self.optimizers
        ]
        return phase.mark

    def counter_lines(self) -> list[str]:
        """Format the counters as log lines."""
        return counter_lines(self.counters, self.phase)

    def scheduler_loaded(self, section: SchedulerDocument) -> None:
        """Add the scheduler's values, and warnings about values that rise.

        Args:
            section: The scheduler's values from the first resumed step on.
        """
        self.scheduler = section
        for number, report in enumerate(self.optimizers):
            found = jumps(report.plan, self._first_step(number))
            notes = dict.fromkeys((*report.notes, *found))
            self.optimizers[number] = replace(report, notes=tuple(notes))

    def _first_step(self, optimizer: int) -> dict[int, tuple[float, float]]:
        first = [] if self.scheduler is None else self.scheduler["first_step"]
        return {
            f["group"]: (f["lr"], f["weight_decay"]) for f in first if f["optimizer"] == optimizer
        }

    def scheduler_lines(self) -> list[str]:
        """Format the first resumed step as log lines."""
        if self.scheduler is None:
            return []
        first = self.scheduler["first_step"]
        lines = [
            f" > first resumed step, optimizer {f['optimizer']} group {f['group']}: learning rate "
            f"{f['lr']:.6E}, weight decay {f['weight_decay']:g}"
            for f in first
        ]
        found = (
            text
            for number, report in enumerate(self.optimizers)
            for text in jumps(report.plan, self._first_step(number))
        )
        return [*lines, *(f" > WARNING: {text}" for text in dict.fromkeys(found))]

    def to_json(self) -> ReportDocument:
        """Build the JSON document of the report."""
        return {
            "schema": SCHEMA,
            "megatron_ext": __version__,
            "megatron_core": self.megatron,
            "environment": self.environment,
            "policy": policy_json(self.optimizers),
            "phase": phase_json(self.phase),
            "counters": counters_json(self.counters),
            "parameters": parameters_json(self.mapped),
            "optimizers": [optimizer_json(r) for r in self.optimizers],
            "scheduler": self.scheduler,
        }
