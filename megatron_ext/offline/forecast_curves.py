"""Compute the curves of a forecast: the checkpoint's run up to now, then the resumed run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint.stored import StoredCheckpoint
from ..host.schedule import ScheduleValues, values_of, with_saved
from ..policy.counters import Counters, last_iteration, ramp_of
from ..report.curves import Curve, Span, phase_curves
from .findings import Findings
from .forecast_counters import saved_counters
from .forecast_model import LABELS, OptimizerForecast
from .planned_arguments import state_of


def curves_of(
    found: Findings,
    stored: StoredCheckpoint,
    arguments: tuple[Any, Any],
    values: ScheduleValues | None,
    optimizers: Sequence[OptimizerForecast],
    groups: Sequence[Sequence[Mapping[str, Any]]],
    counters: tuple[Counters, Counters] | None,
) -> tuple[Curve, ...]:
    """Compute the curves of the checkpoint's run and of the resumed run.

    Args:
        found: Receives errors and notes.
        stored: The checkpoint.
        arguments: The arguments of the checkpoint's run and of the resumed run.
        values: The scheduler's values in the resumed run after the load.
        optimizers: The forecasts of the chain; empty if nothing is loaded.
        groups: The current param_groups of the chain; used if there are no forecasts.
        counters: The counters of the checkpoint and of the resumed run.
    """
    earlier, now = arguments
    state = state_of(stored)
    out: tuple[Curve, ...] = ()
    old = found.tried(lambda: values_of(earlier), [])
    saved = saved_counters(stored)
    if old is not None and saved.num_steps is not None and stored.optimizers:
        if ramp_of(earlier) or ramp_of(now):
            found.notes.append("the batch size ramps up: iterations of the curves are approximate")
        span = _past(saved, earlier)
        before = with_saved(old, state)
        past = [o.groups for o in stored.optimizers]
        out = found.tried(lambda: phase_curves(LABELS[0], 1, before, past, span), found.notes) or ()
    if values is None or counters is None:
        return out
    after = counters[1]
    span = _future(after, now, values, _offset(optimizers))
    future = [[g.values for g in o.plan.groups] for o in optimizers] or groups
    future_curves = found.scheduled(lambda: phase_curves(LABELS[1], 2, values, future, span))
    return (*out, *(future_curves or ()))


def first_step(curves: Sequence[Curve], optimizer: int) -> dict[int, tuple[float, float]]:
    """Return learning rate and weight decay of the first resumed step, by param_group.

    Args:
        curves: The curves of both runs.
        optimizer: Position of the optimizer in the chain.
    """
    resumed = (c for c in curves if c.phase == 2 and c.optimizer == optimizer)
    return {c.group: (c.lr[0], c.weight_decay[0]) for c in resumed}


def _offset(optimizers: Sequence[OptimizerForecast]) -> int:
    """Return data position minus the samples of the counted iterations, in samples."""
    phase = optimizers[0].plan.phase if optimizers else None
    return 0 if phase is None or phase.mark is None else phase.mark.offset


def _past(saved: Counters, args: Any) -> Span:
    """Return the iterations of the checkpoint's run up to its position in the schedule."""
    last, size = saved.iteration, args.global_batch_size
    position = saved.num_steps or 0
    if ramp_of(args) or not size:
        return Span(0, last, 0, position)
    done = min(last, position // size)
    return Span(last - done, last, position - done * size, position)


def _future(after: Counters, args: Any, values: ScheduleValues, offset: int) -> Span:
    """Return the iterations of the resumed run; if none are left, those of its schedule."""
    size, position = args.global_batch_size, after.num_steps or 0
    last = args.train_iters
    if not last and args.train_samples:
        last = last_iteration(after, offset, args.train_samples, size)
    if not last or last <= after.iteration:
        last = after.iteration + max(0, values.lr_decay_steps - position) // size
    return Span(after.iteration, last, position, position + (last - after.iteration) * size)
