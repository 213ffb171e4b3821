"""Forecast a resume from a checkpoint and a command line."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

from ..checkpoint.pickles import gc_disabled
from ..checkpoint.stored import StoredCheckpoint, open_checkpoint
from ..errors import CheckpointError
from ..host.arguments import dropping_flag
from ..host.optimizers import ADAM, state_of_groups
from ..host.schedule import (
    NOT_SAVED,
    SCHEDULER_VALUES,
    ScheduleValues,
    resumed,
    saved_values,
    values_of,
)
from ..plan.decisions import Circumstances, ResumePlan
from ..plan.hyperparameters import plan_resume
from ..plan.jumps import jumps
from ..plan.mapped import Mapped
from ..plan.parameters import ParameterPlan
from ..plan.preflight import examine
from ..plan.preflight_checkpoint import padded_rows
from ..plan.preflight_phase import identity_of
from ..plan.resized import resized_by, warnings_of
from ..policy.counters import first_iteration
from ..policy.from_flags import request_from_args
from ..policy.phase import Mark, Phase, decide
from ..policy.policy import ResumePolicy
from .command_line import CommandLine, Place, locate, parse
from .current_groups import CurrentGroups, current_groups
from .findings import Findings, quietly
from .forecast_counters import batch_sizes, begun, counters_of
from .forecast_curves import curves_of, first_step
from .forecast_model import Forecast, OptimizerForecast, ScheduledValue
from .moments_forecast import forecast_moments, rules_of
from .parameter_forecast import forecast_parameters
from .planned_arguments import complete, state_of
from .stored_parameters import parameters_of


def forecast(
    checkpoint: str | Path, words: Sequence[str] = (), iteration: int | None = None
) -> Forecast:
    """Forecast a resume.

    Args:
        checkpoint: The directory given to ``--load`` or ``--selective-from``, or the directory of
            one iteration.
        words: Megatron's arguments, those of a whole run or only those that change.
        iteration: The iteration to load; by default that of ``--ckpt-step``, or the newest.

    Returns:
        The forecast. It has `errors` if the resume would be refused.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        PolicyError: The command line names two iterations, or a YAML file.
        SystemExit: A flag is malformed (argparse).
    """
    line = parse(words)
    place = locate(line, checkpoint, iteration)
    with gc_disabled():
        return _forecast(line, place, Path(checkpoint))


def _forecast(line: CommandLine, place: Place, checkpoint: Path) -> Forecast:
    stored = open_checkpoint(place.directories.load or checkpoint, place.iteration)
    stored.require_files()
    try:
        return _Forecaster(stored, line, place).run()
    except (TypeError, ValueError, AttributeError) as e:
        raise CheckpointError(
            f"{stored.directory}: expected arguments, param_groups and a scheduler as Megatron "
            f"saves them, found a value of another kind: {type(e).__name__}: {e}. The "
            "checkpoint was edited or is damaged; load another one"
        ) from e


class _Forecaster:
    """Collects the forecast. An error in one part does not stop the others.

    Args:
        stored: The checkpoint.
        line: The command line.
        place: The checkpoint's place, and the directory that the run would load.
    """

    def __init__(self, stored: StoredCheckpoint, line: CommandLine, place: Place) -> None:
        self.stored = stored
        self.unknown = line.unknown_warning()
        self.arguments = complete(line, place, stored)
        self.now = self.arguments.values
        nothing = CommandLine(argparse.Namespace(), frozenset(), (), "megatron_ext")
        self.before = complete(nothing, place, stored).values
        self.parameters = parameters_of(stored)
        self.found = Findings()

    def run(self) -> Forecast:
        """Make the whole forecast."""
        stored, now = self.stored, self.now
        self._check_length()
        for error in examine(self._as_given(), stored).errors:
            self.found.refuse(error)
        request = quietly(lambda: request_from_args(now))
        policy = None if request is None else request.policy
        dropped = dropping_flag(now)
        if dropped:
            self.found.warnings.append(f"{dropped}: the checkpoint's Adam moments are dropped")
        self._check_directories()
        phase = None if policy is None or dropped else self._phase(policy)
        counters = counters_of(stored, now, phase, dropped)
        values = self.found.tried(lambda: values_of(now), self.found.notes)
        current = self._current_groups(values, used=phase is not None)
        mapped, optimizers = Mapped(), tuple[OptimizerForecast, ...]()
        if phase is not None:
            mapped = forecast_parameters(stored, self.before, now, phase.policy, self.found)
            optimizers = self._optimizers(phase, current, mapped)
        scheduler, after = self._scheduler(policy, values, dropped)
        curves = curves_of(
            self.found,
            self.stored,
            (self.before, now),
            after,
            optimizers,
            current.optimizers,
            counters,
        )
        for number, one in enumerate(optimizers):
            self.found.warnings += jumps(one.plan, first_step(curves, number))
        return Forecast(
            stored=stored,
            arguments=self.arguments,
            errors=tuple(self.found.errors),
            policy=policy,
            phase=phase,
            counters=counters,
            mapped=mapped,
            optimizers=optimizers,
            scheduler=scheduler,
            curves=curves,
            dropped=dropped,
            warnings=tuple(self.found.warnings),
            notes=tuple(dict.fromkeys(self.found.notes)),
        )

    def _assumed(self, flag: str) -> bool:
        return any(a.flag == flag for a in self.arguments.assumed)

    def _as_given(self) -> argparse.Namespace:
        """Copy the arguments without an assumed length of the run and an unknown rate."""
        given = copy.copy(self.now)
        if given.lr is None:
            del given.lr
        if self.arguments.elsewhere is not None:
            given.save = None  # the run would continue from there and not overwrite it
        if self._assumed("--train-iters"):
            given.train_iters = None
        return given

    def _check_length(self) -> None:
        last = getattr(self.now, "train_iters", None)
        reset = bool(getattr(self.now, "reset_iteration", False))
        begins = first_iteration(self.now, reset, self.stored.iteration)
        if self._assumed("--train-iters") and last and last <= begins:
            self.found.notes.append(
                f"--train-iters {last} comes from the checkpoint, and the run begins at {begins}: "
                "give the last iteration of the resumed run"
            )

    def _check_directories(self) -> None:
        arguments = self.arguments
        if arguments.elsewhere is not None:
            self.found.warnings.append(
                f"with these arguments a run loads {arguments.elsewhere}, not {self.stored.root}; "
                "this plan is for the latter"
            )
        if self.unknown is not None:
            self.found.warnings.append(self.unknown)

    def _phase(self, policy: ResumePolicy) -> Phase | None:
        stored = self.stored
        if not stored.optimizers:
            return None

        def decided() -> Phase:
            mark = stored.optimizers[0].mark
            parsed = None if mark is None else Mark.parse(mark)
            where = self.arguments.directories.where
            phase = decide(policy, parsed, identity_of(stored), where)
            offset = parsed.offset if parsed else 0
            return phase.at(begun(stored, self.now, phase.policy, offset)[1])

        return self.found.tried(decided)

    def _current_groups(self, values: ScheduleValues | None, *, used: bool) -> CurrentGroups:
        saved = [o.groups for o in self.stored.optimizers]
        current = current_groups(saved, self.parameters, self.before, self.now)
        if values is not None:
            current = self.found.scheduled(lambda: current.at_first(values)) or current
        if current.unknown and used:
            self.found.warnings.append(
                f"the current param_groups are not known: {current.unknown}. Those below are "
                "assumed: the checkpoint's with the arguments' values. A run with "
                "--selective-dry-run shows the real ones"
            )
        self.found.notes += current.notes
        return current

    def _optimizers(
        self, phase: Phase, found: CurrentGroups, mapped: Mapped
    ) -> tuple[OptimizerForecast, ...]:
        stored, now = self.stored, self.now
        counters = counters_of(stored, now, phase, None)
        assert counters is not None  # there is a phase
        sizes = batch_sizes(stored, (self.before, now), counters)
        plans = []
        for saved, current in zip(stored.optimizers, found.optimizers, strict=True):
            circumstances = Circumstances(
                clip_grad=getattr(now, "clip_grad", None) or 0.0,
                decoupled_weight_decay=getattr(now, "decoupled_weight_decay", None) is not False,
                global_batch_size=sizes,
                optimizer=state_of_groups(current) or ADAM,
            )
            plans.append(
                self.found.tried(
                    lambda s=saved, c=current, x=circumstances: plan_resume(  # type: ignore[misc]
                        phase.policy, s, c, x, phase
                    )
                )
            )
        moments = self._moments(phase.policy, plans, found, mapped)
        out = []
        for plan, decided in zip(plans, moments, strict=True):
            if plan is None:
                continue
            resized = tuple(
                resized_by(d) for d in decided or () if d.parameter.saved_rows is not None
            )
            self.found.warnings += warnings_of(plan, resized)
            rules = None if decided is None else rules_of(phase.policy, decided)
            out.append(OptimizerForecast(plan, rules, resized))
        return tuple(out)

    def _moments(
        self,
        policy: ResumePolicy,
        plans: Sequence[ResumePlan | None],
        current: CurrentGroups,
        mapped: Mapped,
    ) -> tuple[tuple[ParameterPlan, ...] | None, ...]:
        """Return the plans of each optimizer's parameters; None if they are not known."""
        rows = padded_rows(self.stored.args, self.now)
        found = forecast_moments(
            self.stored,
            policy,
            plans,
            current,
            self.parameters,
            None if rows is not None and rows[0] == rows[1] else rows,
            decoupled=getattr(self.before, "decoupled_lr", None) is not None,
            new=mapped.new_to_optimizer,
        )
        for error in found.errors:
            self.found.refuse(error)
        self.found.warnings += found.warnings
        self.found.notes += found.notes
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
