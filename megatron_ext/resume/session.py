"""The state of the process, of a resume and of the current load.

`current` is the only mutable module-level object of the package. The state of a load is in its
`Load`, which is dropped when the load ends.
"""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import torch
import torch.distributed as dist

from ..base.log import say
from ..checkpoint.state import MARK_KEY, DirectoryRole, SavedOptimizer
from ..errors import CheckpointError
from ..plan.mapped import Mapped
from ..plan.preflight import Preflight
from ..policy.counters import Counters
from ..policy.phase import Mark, Phase, decide, identity
from ..policy.policy import ResumePolicy
from ..policy.request import Request
from ..report.model import OptimizerReport
from ..report.resume_report import ResumeReport
from ..report.schema import EnvironmentDocument, SchedulerDocument
from ..rules.form import Key
from .vocabulary import RowChanges


@dataclass
class Load:
    """The state of one load of a checkpoint, from its beginning to its end.

    Args:
        resume: The resume whose optimizers are loaded.
        scoped: Whether `Resume.loading` ends the load. Otherwise it ends with the last optimizer.
        batch_sizes: Global batch sizes of the two runs at their positions, in samples; None
            if one is unknown.
        phase: The phase that begins or continues; None until it is decided.
        saved_mark: The saved mark from which `phase` was decided.
        counters: The checkpoint's counters and those after the load; None without Megatron's
            training loop.
        awaits_tensors: Whether the next ``dist_checkpointing.load`` fills the optimizers.
        unread: For each moment, the parameters on this rank whose moment was not read because the
            policy overwrites it (`megatron_ext.resume.selective_read`).
        rows: The model parameters whose number of rows differs from the checkpoint's.
        slots: Where the load puts what only the optimizers have
            (`megatron_ext.resume.parameter_map.Slot`).
        new: State key -> ids of the model parameters whose tensor is not in the checkpoint.
        mapped: The sources of the parameters; None if the load does not name parameters.
        reports: The reports of the loaded optimizers, by position in the chain.
    """

    resume: Resume
    scoped: bool = False
    batch_sizes: tuple[int, int] | None = None
    phase: Phase | None = None
    saved_mark: str | None = None
    counters: tuple[Counters, Counters] | None = None
    awaits_tensors: bool = False
    unread: Mapping[Key, frozenset[str]] = field(default_factory=dict)
    rows: RowChanges = field(default_factory=RowChanges)
    slots: list[Any] = field(default_factory=list)
    new: Mapping[str, frozenset[int]] = field(default_factory=dict)
    mapped: Mapped | None = None
    reports: dict[int, OptimizerReport] = field(default_factory=dict)
    _entered: set[tuple[str, int]] = field(default_factory=set)

    def made(self, model_param: torch.Tensor) -> frozenset[str]:
        """The state keys of a model parameter that are new."""
        return frozenset(key for key, ids in self.new.items() if id(model_param) in ids)

    def enter(self, step: str, member: int) -> bool:
        """Record that an optimizer takes a step of this load; return whether it is the first time.

        Args:
            step: ``allocate`` or ``plan``.
            member: Position of the optimizer in the chain.
        """
        first = (step, member) not in self._entered
        self._entered.add((step, member))
        return first


@dataclass
class Session:
    """The state of this process.

    Args:
        launched: The launcher's request.
        scoped: The request of the current library call.
        read: The last arguments from which a request was read, and the request.
        preflight: The result of the preflight before the script or before the model was built.
        agreed: Whether all ranks have agreed on the preflight's result.
        built: Number of optimizers that were built by request.
        member: The last of them, which the others of a chain share a resume with.
        load: The current load, until it ends.
        resumed: The resume of the running training; None if its optimizer was not loaded.
    """

    launched: Request | None = None
    scoped: Request | None = None
    read: tuple[str, Request] | None = None
    preflight: Preflight | None = None
    agreed: bool = False
    built: int = 0
    member: Any = None
    load: Load | None = None
    resumed: Resume | None = None


#: The state of the process.
current = Session()


@dataclass
class Resume:
    """A resume that all optimizers of a chain share, so that the run gets one report.

    Args:
        policy: The user's policy.
        write_report: Writes a report on rank 0 and returns a line for the log
            (`megatron_ext.report.files.writer`); None to write none.
        megatron: Version of megatron-core, for the report.
        where: The role of the checkpoint's directory.
        verify: Whether the CRC32 of everything that is read is compared.
        guard: Whether the first step is checked against the plan.
        members: The optimizers of the chain, in its order.
        report: The report of the last load, once it is complete.
        load: The current load.
    """

    policy: ResumePolicy = field(default_factory=ResumePolicy)
    write_report: Callable[[ResumeReport], str] | None = None
    megatron: str = ""
    where: DirectoryRole = "load"
    verify: bool = False
    guard: bool = True
    members: list[Any] = field(default_factory=list)
    report: ResumeReport | None = None
    load: Load | None = None

    @contextlib.contextmanager
    def loading(self) -> Iterator[Load]:
        """Begin a load for the calls inside, and end it even if one of them raises."""
        self.load = load = self._begin(scoped=True)
        try:
            yield load
        finally:
            self.end_load()

    def end_load(self) -> None:
        """Drop the state of the load."""
        if current.load is not None and current.load.resume is self:
            current.load = None
        self.load = None

    def enter(self, step: str, optimizer: Any) -> Load:
        """Return the load of an optimizer's step.

        If the optimizer takes the step a second time, and the load is not scoped, a new load
        begins.

        Args:
            step: ``allocate`` or ``plan``.
            optimizer: One of the members.
        """
        member = next(i for i, one in enumerate(self.members) if one is optimizer)
        load = self.load or self._begin()
        if not load.enter(step, member) and not load.scoped:
            load = self._begin()
            load.enter(step, member)
        return load

    def announce(self, phase: Phase, mark: str | None, before: Counters, after: Counters) -> None:
        """Record the phase and the counters, which are decided before the optimizers are loaded."""
        load = self.load or self._begin()
        load.phase, load.saved_mark, load.counters = phase, mark, (before, after)

    def phase_of(self, saved: SavedOptimizer) -> Phase:
        """Decide whether a phase begins or continues, once for all optimizers of a chain.

        Raises:
            CheckpointError: The optimizers of the chain were saved in different phases.
            PlanError: The checkpoint belongs to another phase (`megatron_ext.policy.phase.decide`).
        """
        load = self.load or self._begin()
        if load.phase is None:
            mark = None if saved.mark is None else Mark.parse(saved.mark)
            source = identity("checkpoint", 0, {}, saved.groups, saved.step)
            load.phase = decide(self.policy, mark, source, self.where)
            load.saved_mark = saved.mark
        elif saved.mark != load.saved_mark:
            raise CheckpointError(
                "the optimizers of the checkpoint were saved in different phases: found "
                f"{load.saved_mark} and {saved.mark}, expected one. The checkpoint was edited; "
                "load another one"
            )
        return load.phase

    @property
    def phase(self) -> Phase | None:
        """The phase of the current load, or of the last complete one."""
        if self.load is not None:
            return self.load.phase
        return None if self.report is None else self.report.phase

    @property
    def counters(self) -> tuple[Counters, Counters] | None:
        """The counters of the checkpoint and after the load, of the current or last load."""
        if self.load is not None:
            return self.load.counters
        return None if self.report is None else self.report.counters

    def join(self, optimizer: Any) -> None:
        """Register an optimizer of the chain, in the chain's order."""
        self.members.append(optimizer)

    @property
    def complete(self) -> bool:
        """Whether every optimizer of the chain has been loaded."""
        return self.report is not None

    def done(self, optimizer: Any, report: OptimizerReport) -> None:
        """Take one optimizer's report. After the last one, log and write the run's report."""
        load = self.load or self._begin()
        index = next(i for i, member in enumerate(self.members) if member is optimizer)
        load.reports[index] = report
        if len(load.reports) < len(self.members):
            return
        self.report = ResumeReport(
            self.megatron,
            [load.reports[i] for i in range(len(self.members))],
            counters=load.counters,
            environment=_environment(),
            mapped=load.mapped or Mapped(),
        )
        if not load.scoped:
            self.end_load()
        say(self.report.lines())
        say(self._write())

    def count_from(self, before: Counters) -> Counters:
        """Give a training loop its counters, and write their offset into the phase's mark.

        Megatron's own loop has announced them before the load (`announce`).

        Args:
            before: The checkpoint's counters.
        """
        if self.report is None:
            return before
        if self.report.counters is None:
            mark = self.report.count_from(before)
            for member in self.members if mark is not None else ():
                for group in () if member.optimizer is None else member.optimizer.param_groups:
                    group[MARK_KEY] = str(mark)
            say(self.report.counter_lines())
            self._write()
        assert self.report.counters is not None
        return self.report.counters[1]

    def scheduler_loaded(self, section: SchedulerDocument) -> None:
        """Add the scheduler's values from the first resumed step on, and write the report again."""
        if self.report is not None:
            self.report.scheduler_loaded(section)
            say(self.report.scheduler_lines())
            self._write()

    def _begin(self, *, scoped: bool = False) -> Load:
        self.report = None
        self.load = current.load = Load(self, scoped)
        return self.load

    def _write(self) -> list[str]:
        """Write the report on rank 0 if it is requested; returns lines for the log."""
        on_rank_0 = not dist.is_initialized() or dist.get_rank() == 0
        if self.report is None or self.write_report is None or not on_rank_0:
            return []
        try:
            return [self.write_report(self.report)]
        except OSError as e:  # the run is worth more than its report
            return [f"megatron_ext: WARNING: the resume report could not be written: {e}"]


def _environment() -> EnvironmentDocument:
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "ranks": dist.get_world_size() if dist.is_initialized() else 1,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
