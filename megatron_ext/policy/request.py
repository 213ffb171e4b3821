"""What is asked of a process: the class to build and the policy of the resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.state import DirectoryRole
from .policy import ResumePolicy

DEFAULT_CLASS = "megatron_ext.SelectiveAdam"


@dataclass(frozen=True)
class Request:
    """That optimizers are to be built with a class of the user's choice.

    Args:
        optimizer_class: Dotted path to a `DistributedOptimizer` subclass.
        policy: What to take from where, for `SelectiveAdam` and its subclasses.
        report_dir: Where the report goes, or None.
        where: What the directory of ``--load`` is to the phase.
        guard: Whether the first resumed steps are checked against the plan.
        dry_run: Whether the run ends before its first step.
    """

    optimizer_class: str = DEFAULT_CLASS
    policy: ResumePolicy = field(default_factory=ResumePolicy)
    report_dir: Path | None = None
    where: DirectoryRole = "load"
    guard: bool = True
    dry_run: bool = False
