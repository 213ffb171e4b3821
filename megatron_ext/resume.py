"""One resume of one run: its policy, the optimizers that take part, and their common report."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .log import say
from .policy import ResumePolicy
from .report import OptimizerReport, ResumeReport


@dataclass
class Resume:
    """Shared by all optimizers of a chain, so that the run gets one report.

    Args:
        policy: What the user asked.
        report_dir: Where rank 0 writes the JSON report, or None.
        megatron: Version of megatron-core, for the report.
        global_batch_size: Of the checkpoint's run and of this one, where both are known.
    """

    policy: ResumePolicy = field(default_factory=ResumePolicy)
    report_dir: Path | None = None
    megatron: str = ""
    global_batch_size: tuple[int, int] | None = None
    members: list[Any] = field(default_factory=list)
    report: ResumeReport | None = None
    _done: dict[int, OptimizerReport] = field(default_factory=dict)
    _told: bool = False

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
            reports = [self._done[i] for i in range(len(self.members))]
            self.report = ResumeReport(self.megatron, reports)
            say(self.report.lines())
            self._write()

    def scheduler_loaded(self, section: dict[str, Any]) -> None:
        """Add what the scheduler will use from the first resumed step on."""
        if self.report is not None:
            self.report.scheduler = section
            say(self.report.scheduler_lines())
            self._write()

    def _write(self) -> None:
        on_rank_0 = not dist.is_initialized() or dist.get_rank() == 0
        if self.report is not None and self.report_dir is not None and on_rank_0:
            path = self.report.write(self.report_dir)
            # Written again when the scheduler is loaded; a script may have none.
            if not self._told:
                say(f"megatron_ext: resume report written to {path}")
            self._told = True
