"""What a resume would do, from a checkpoint's metadata and a command line: `Forecast`.

No GPU, no ranks, no model and no tensor. Decisions are those of the modules that a run uses
(`plan`, `phase`, `counters`, `moment_plan`, `preflight`); what only a run can know is assumed, and
told.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from . import host
from .arguments import request_from_args
from .counters import Counters, begin, last_iteration, ramp_of
from .current_groups import current_groups
from .curves import Curve, Span, phase_curves
from .errors import CheckpointError, MegatronExtError
from .host.schedule import ScheduleValues, resumed, values_of, with_saved
from .host.scheduling import NOT_SAVED, SCHEDULER_VALUES, saved_values
from .inert import without_collection
from .moment_plan import ParameterPlan
from .moments_forecast import RuleForecast, forecast_moments, rules_of
from .phase import Mark, Phase, decide
from .plan import Circumstances, ResumePlan, plan_resume
from .planned_arguments import (
    CommandLine,
    Place,
    PlannedArguments,
    complete,
    locate,
    parse,
    state_of,
)
from .policy import ResumePolicy
from .preflight import findings, identity_of, padded_rows
from .resized import ResizedParameter, resized_by, warnings_of
from .stored import StoredCheckpoint, open_checkpoint

T = TypeVar("T")

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
    """One value of the scheduler, as `megatron_ext.plan.Decision` has those of groups."""

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


def forecast(
    checkpoint: str | Path, words: Sequence[str] = (), iteration: int | None = None
) -> Forecast:
    """Say what a resume would do.

    Args:
        checkpoint: What is given to ``--load`` or ``--selective-from``, or one iteration's own
            directory.
        words: Megatron's arguments, as for a run or only what is to change.
        iteration: Which one; the newest, or that of ``--ckpt-step``, by default.

    Returns:
        All of it; a resume that would be refused is one with `errors`.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        PolicyError: The command line names two iterations, or a YAML file.
        SystemExit: A flag is malformed (argparse).
    """
    line = parse(words)
    place = locate(line, checkpoint, iteration)
    with without_collection():
        return _forecast(line, place, Path(checkpoint))


def _forecast(line: CommandLine, place: Place, checkpoint: Path) -> Forecast:
    stored = open_checkpoint(place.directories.load or checkpoint, place.iteration)
    if stored.store is not None:
        stored.store.require_files()
    try:
        return _Forecaster(stored, line, place).run()
    except (TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(
            f"{stored.directory}: expected arguments, param_groups and a scheduler as Megatron "
            f"saves them, found a value of another kind: {type(e).__name__}: {e}. The "
            "checkpoint was edited or is damaged; load another one"
        ) from e


class _Forecaster:
    """Collects what is found; every part is tried, whatever is wrong with another.

    Args:
        stored: The checkpoint.
        line: The command line.
        place: Where it lies, and what the run would load.
    """

    def __init__(self, stored: StoredCheckpoint, line: CommandLine, place: Place) -> None:
        self.stored = stored
        self.arguments = complete(line, place, stored)
        self.now = self.arguments.values
        nothing = CommandLine(argparse.Namespace(), frozenset(), (), "megatron_ext")
        self.before = complete(nothing, place, stored).values
        self.errors: list[MegatronExtError] = []
        self.warnings: list[str] = []
        self.notes: list[str] = []

    def run(self) -> Forecast:
        """Everything."""
        stored, now = self.stored, self.now
        self._look_at_the_length()
        for error in findings(self._as_given(), stored):
            self._refuse(error)
        request = _quietly(lambda: request_from_args(now))
        policy = None if request is None else request.policy
        dropped = host.dropping_flag(now)
        if dropped:
            self.warnings.append(f"{dropped}: the checkpoint's Adam moments are dropped")
        self._look_at_the_directories()
        phase = None if policy is None or dropped else self._phase(policy)
        counters = self._counters(phase, dropped)
        values = self._tried(lambda: values_of(now), self.notes)
        groups = self._current_groups(values)
        optimizers = () if phase is None else self._optimizers(phase, groups)
        scheduler, after = self._scheduler(policy, values, dropped)
        curves = self._curves(after, optimizers, groups, counters)
        return Forecast(
            stored=stored,
            arguments=self.arguments,
            errors=tuple(self.errors),
            policy=policy,
            phase=phase,
            counters=counters,
            optimizers=optimizers,
            scheduler=scheduler,
            curves=curves,
            dropped=dropped,
            warnings=tuple(self.warnings),
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _refuse(self, error: MegatronExtError) -> None:
        if str(error) not in map(str, self.errors):
            self.errors.append(error)

    def _tried(self, call: Callable[[], T], notes: list[str] | None = None) -> T | None:
        """What it gives; an error refuses the resume, or is a note."""
        try:
            return call()
        except MegatronExtError as e:
            if notes is None:
                self._refuse(e)
            else:
                notes.append(str(e))
            return None

    def _accepted(self, call: Callable[[], T]) -> T | None:
        """What Megatron's scheduler gives; its refusal of what is refused already is a note."""
        return self._tried(call, self.notes if self.errors else None)

    def _assumed(self, flag: str) -> bool:
        return any(a.flag == flag for a in self.arguments.assumed)

    def _as_given(self) -> argparse.Namespace:
        """The arguments without a length of the run that nobody has given."""
        given = copy.copy(self.now)
        if self.arguments.elsewhere is not None:
            given.save = None  # a run goes on from what is there, and does not overwrite it
        if self._assumed("--train-iters"):
            given.train_iters = None
        return given

    def _look_at_the_length(self) -> None:
        last = getattr(self.now, "train_iters", None)
        begins = 0 if getattr(self.now, "reset_iteration", False) else self.stored.iteration
        if self._assumed("--train-iters") and last and last <= begins:
            self.notes.append(
                f"--train-iters {last} is the checkpoint's and ends at its iteration {begins}: "
                "give the last iteration of the resumed run"
            )

    def _look_at_the_directories(self) -> None:
        arguments = self.arguments
        if arguments.elsewhere is not None:
            self.warnings.append(
                f"with these arguments a run loads {arguments.elsewhere}, not {self.stored.root}; "
                "this plan is for the latter"
            )
        if arguments.unknown:
            words = " ".join(arguments.unknown[:20])
            more = " ..." if len(arguments.unknown) > 20 else ""
            self.notes.append(
                f"not looked at, for {arguments.parsed_by} does not know it (a script's own "
                f"arguments, or a mistake): {words}{more}"
            )

    def _phase(self, policy: ResumePolicy) -> Phase | None:
        stored = self.stored
        if not stored.optimizers:
            return None

        def decided() -> Phase:
            mark = stored.optimizers[0].mark
            parsed = None if mark is None else Mark.parse(mark)
            where = self.arguments.directories.where
            phase = decide(policy, parsed, identity_of(stored), where)
            _, offset = begin(phase.policy, self._saved_counters(), parsed.offset if parsed else 0)
            return phase.at(offset)

        return self._tried(decided)

    def _saved_counters(self) -> Counters:
        args, position = self.stored.args, state_of(self.stored).get("num_steps")
        names = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
        return Counters(
            self.stored.iteration,
            **{name: int(args.get(name) or 0) for name in names},
            num_steps=None if position is None else int(position),
        )

    def _counters(
        self, phase: Phase | None, dropped: str | None
    ) -> tuple[Counters, Counters] | None:
        saved = self._saved_counters()
        if phase is not None:
            return saved, begin(phase.policy, saved, 0)[0]
        if not dropped:
            return None
        kept = dropped != "--finetune"
        position = None if saved.num_steps is None else 0
        return saved, Counters(
            saved.iteration if kept else 0,
            saved.consumed_train_samples if kept else 0,
            saved.skipped_train_samples if kept else 0,
            saved.consumed_valid_samples if kept else 0,
            position,
        )

    def _current_groups(
        self, values: ScheduleValues | None
    ) -> tuple[tuple[Mapping[str, Any], ...], ...]:
        saved = [o.groups for o in self.stored.optimizers]
        found = self._accepted(lambda: current_groups(saved, self.before, self.now, values))
        if found is None:
            found = current_groups(saved, self.before, self.now, None)
        self.notes += found.notes
        return found.optimizers

    def _optimizers(
        self, phase: Phase, groups: Sequence[Sequence[Mapping[str, Any]]]
    ) -> tuple[OptimizerForecast, ...]:
        stored, now = self.stored, self.now
        sizes = self.before.global_batch_size, now.global_batch_size
        plans = []
        for saved, current in zip(stored.optimizers, groups, strict=True):
            circumstances = Circumstances(
                clip_grad=getattr(now, "clip_grad", None) or 0.0,
                decoupled_weight_decay=getattr(now, "decoupled_weight_decay", None) is not False,
                global_batch_size=sizes if all(sizes) else None,
                adam=any("betas" in g for g in current),
            )
            plans.append(
                self._tried(
                    lambda s=saved, c=current, x=circumstances: plan_resume(  # type: ignore[misc]
                        phase.policy, s, c, x, phase
                    )
                )
            )
        moments = self._moments(phase.policy, plans, groups)
        out = []
        for plan, decided in zip(plans, moments, strict=True):
            if plan is None:
                continue
            resized = tuple(
                resized_by(d) for d in decided or () if d.parameter.saved_rows is not None
            )
            self.warnings += warnings_of(plan, resized)
            rules = None if decided is None else rules_of(phase.policy, decided)
            out.append(OptimizerForecast(plan, rules, resized))
        return tuple(out)

    def _moments(
        self,
        policy: ResumePolicy,
        plans: Sequence[ResumePlan | None],
        groups: Sequence[Sequence[Mapping[str, Any]]],
    ) -> tuple[tuple[ParameterPlan, ...] | None, ...]:
        """For each optimizer what is done to its parameters; None where that is not known."""
        rows = padded_rows(self.stored.args, self.now)
        found = forecast_moments(
            self.stored,
            policy,
            plans,
            groups,
            None if rows is not None and rows[0] == rows[1] else rows,
            decoupled=getattr(self.before, "decoupled_lr", None) is not None,
        )
        for error in found.errors:
            self._refuse(error)
        self.warnings += found.warnings
        self.notes += found.notes
        return found.decided

    def _scheduler(
        self, policy: ResumePolicy | None, values: ScheduleValues | None, dropped: str | None
    ) -> tuple[dict[str, ScheduledValue], ScheduleValues | None]:
        state = state_of(self.stored)
        if policy is None or values is None:
            return {}, None
        if dropped:
            return {}, values
        after = resumed(policy, values, state)
        saved = saved_values(policy)
        return {
            name: ScheduledValue(
                state.get(name),
                getattr(values, name),
                getattr(after, name),
                "checkpoint" if name in saved else "arguments",
            )
            for name in (*SCHEDULER_VALUES, *NOT_SAVED)
        }, after

    def _curves(
        self,
        values: ScheduleValues | None,
        optimizers: Sequence[OptimizerForecast],
        groups: Sequence[Sequence[Mapping[str, Any]]],
        counters: tuple[Counters, Counters] | None,
    ) -> tuple[Curve, ...]:
        stored, state = self.stored, state_of(self.stored)
        out: tuple[Curve, ...] = ()
        old = self._tried(lambda: values_of(self.before), [])
        saved = self._saved_counters()
        if old is not None and saved.num_steps is not None and stored.optimizers:
            if ramp_of(self.before) or ramp_of(self.now):
                self.notes.append(
                    "the batch size ramps up: iterations of the curves are approximate"
                )
            span = _past(saved, self.before)
            before = with_saved(old, state)
            past = [o.groups for o in stored.optimizers]
            out = (
                self._tried(lambda: phase_curves(LABELS[0], 1, before, past, span), self.notes)
                or ()
            )
        if values is None or counters is None:
            return out
        after = counters[1]
        span = _future(after, self.now, values, _offset(optimizers))
        future = [[g.values for g in o.plan.groups] for o in optimizers] or groups
        found = self._accepted(lambda: phase_curves(LABELS[1], 2, values, future, span))
        return (*out, *(found or ()))


def _quietly(call: Callable[[], T]) -> T | None:
    """None for an error that the preflight has told already."""
    try:
        return call()
    except MegatronExtError:
        return None


def _offset(optimizers: Sequence[OptimizerForecast]) -> int:
    """Data position minus what the iterations have counted, in samples."""
    phase = optimizers[0].plan.phase if optimizers else None
    return 0 if phase is None or phase.mark is None else phase.mark.offset


def _past(saved: Counters, args: Any) -> Span:
    """The iterations of the checkpoint's run, as far as its schedule has come."""
    last, size = saved.iteration, args.global_batch_size
    position = saved.num_steps or 0
    if ramp_of(args) or not size:
        return Span(0, last, 0, position)
    done = min(last, position // size)
    return Span(last - done, last, position - done * size, position)


def _future(after: Counters, args: Any, values: ScheduleValues, offset: int) -> Span:
    """The iterations of the resumed run; without any left, as long as its schedule changes."""
    size, position = args.global_batch_size, after.num_steps or 0
    last = args.train_iters
    if not last and args.train_samples:
        last = last_iteration(after, offset, args.train_samples, size)
    if not last or last <= after.iteration:
        last = after.iteration + max(0, values.lr_decay_steps - position) // size
    return Span(after.iteration, last, position, position + (last - after.iteration) * size)
