"""One resume of one run: its policy, the optimizers that take part, and their common report."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
import torch.distributed as dist

from ..base.log import say
from ..checkpoint.state import DirectoryRole, SavedOptimizer
from ..errors import CheckpointError
from ..policy.counters import Counters
from ..policy.phase import Mark, Phase, decide, identity
from ..policy.policy import ResumePolicy
from ..report.model import OptimizerReport
from ..report.resume_report import ResumeReport
from ..report.schema import EnvironmentDocument, SchedulerDocument
from ..rules.form import Key


@dataclass
class Resume:
    """Shared by all optimizers of a chain, so that the run gets one report.

    Args:
        policy: What the user asked.
        write_report: Writes a report on rank 0 and returns a line for the log
            (`megatron_ext.report.files.writer`), or None.
        megatron: Version of megatron-core, for the report.
        global_batch_size: Of the checkpoint's run and of this one, where both are known.
        where: Which directory the checkpoint lies in.
        phase: Whether a phase begins or goes on, from the last load.
        counters: The checkpoint's and those the run goes on with, where Megatron's training loop
            loads.
        members: The optimizers of the chain.
        unread: For each moment the parameters on this rank that it was not read of, because the
            policy overwrites it (`megatron_ext.resume.selective_read`).
        report: Of the last complete load.
    """

    policy: ResumePolicy = field(default_factory=ResumePolicy)
    write_report: Callable[[ResumeReport], str] | None = None
    megatron: str = ""
    global_batch_size: tuple[int, int] | None = None
    where: DirectoryRole = "load"
    phase: Phase | None = None
    counters: tuple[Counters, Counters] | None = None
    members: list[Any] = field(default_factory=list)
    unread: Mapping[Key, frozenset[str]] = field(default_factory=dict)
    report: ResumeReport | None = None
    _done: dict[int, OptimizerReport] = field(default_factory=dict)
    #: The saved mark that `phase` was decided from; it holds until the load is complete.
    _decided: list[str | None] = field(default_factory=list)

    def begin_load(self) -> None:
        """A checkpoint is about to be loaded."""
        self.phase, self.counters, self.unread = None, None, {}
        self._decided.clear()

    def announce(self, phase: Phase, mark: str | None, before: Counters, after: Counters) -> None:
        """Take what was decided for the whole run before the optimizers are loaded."""
        self.phase, self.counters = phase, (before, after)
        self._decided[:] = [mark]

    def phase_of(self, saved: SavedOptimizer) -> Phase:
        """Whether a phase begins or goes on, the same for all optimizers of a chain.

        Raises:
            CheckpointError: The optimizers of the chain were saved in different phases.
            PlanError: The checkpoint is another phase's (`megatron_ext.policy.phase.decide`).
        """
        if not self._decided or self.phase is None:
            mark = None if saved.mark is None else Mark.parse(saved.mark)
            source = identity("checkpoint", 0, {}, saved.groups, saved.step)
            self.phase = decide(self.policy, mark, source, self.where)
            self._decided[:] = [saved.mark]
        elif saved.mark != self._decided[0]:
            raise CheckpointError(
                "the optimizers of the checkpoint were saved in different phases: found "
                f"{self._decided[0]} and {saved.mark}, expected one. The checkpoint was edited; "
                "load another one"
            )
        return self.phase

    def join(self, optimizer: Any) -> None:
        """Register an optimizer of the chain, in the chain's order."""
        self.members.append(optimizer)

    @property
    def complete(self) -> bool:
        """Whether every optimizer of the chain has got its state back."""
        return bool(self.members) and len(self._done) == len(self.members)

    def done(self, optimizer: Any, report: OptimizerReport) -> None:
        """Take one optimizer's report; after the last one, log and write the run's."""
        index = next(i for i, member in enumerate(self.members) if member is optimizer)
        if index in self._done and self.complete:
            self._done.clear()
        self._done[index] = report
        if self.complete:
            self._decided.clear()
            self.unread = {}
            reports = [self._done[i] for i in range(len(self.members))]
            self.report = ResumeReport(
                self.megatron, reports, counters=self.counters, environment=_environment()
            )
            say(self.report.lines())
            say(self._write())

    def scheduler_loaded(self, section: SchedulerDocument) -> None:
        """Add what the scheduler will use from the first resumed step on, and write once more."""
        if self.report is not None:
            self.report.scheduler = section
            say(self.report.scheduler_lines())
            self._write()

    def _write(self) -> list[str]:
        """Write the report where that is asked for; returns lines for the log."""
        on_rank_0 = not dist.is_initialized() or dist.get_rank() == 0
        if self.report is None or self.write_report is None or not on_rank_0:
            return []
        return [self.write_report(self.report)]


def _environment() -> EnvironmentDocument:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
