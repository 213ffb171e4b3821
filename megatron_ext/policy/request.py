"""The request to a process: the optimizer class to build and the policy of the resume."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..checkpoint.state import DirectoryRole
from .policy import ResumePolicy

DEFAULT_CLASS = "megatron_ext.SelectiveAdam"


@dataclass(frozen=True)
class Request:
    """The request to build optimizers with a class of the user's choice.

    Args:
        optimizer_class: Dotted path of a `DistributedOptimizer` subclass.
        policy: The policy for `SelectiveAdam` and its subclasses.
        report_dir: Directory for the report, or None.
        where: Role of the directory of ``--load`` in the phase.
        guard: Whether the first resumed step is checked against the plan.
        dry_run: Whether the run ends before its first step.
        verify: Whether the CRC32 of everything that is read is compared.
    """

    optimizer_class: str = DEFAULT_CLASS
    policy: ResumePolicy = field(default_factory=ResumePolicy)
    report_dir: Path | None = None
    where: DirectoryRole = "load"
    guard: bool = True
    dry_run: bool = False
    verify: bool = False
