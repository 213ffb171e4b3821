"""Compute the learning rate and weight decay of a phase over its iterations. Pure.

Megatron's own scheduler computes the numbers, without an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..host.schedule import ScheduleValues, scheduled

#: Largest number of points of a curve, for runs of any length.
LIMIT = 400


@dataclass(frozen=True)
class Span:
    """The range of iterations of a curve.

    Args:
        first: Number of finished iterations at its beginning.
        last: Number of finished iterations at its end.
        first_sample: The scheduler's position at `first`, in samples.
        last_sample: The scheduler's position at `last`, in samples.
    """

    first: int
    last: int
    first_sample: int
    last_sample: int

    def sample(self, iteration: int) -> int:
        """Compute the scheduler's position after some iterations, for batches of equal size."""
        done = (iteration - self.first) * (self.last_sample - self.first_sample)
        return self.first_sample + (done // (self.last - self.first) if done else 0)

    def iteration(self, sample: float) -> int:
        """Find the first iteration at which the scheduler has reached a position in samples."""
        size = self.last_sample - self.first_sample
        if size <= 0:
            return self.first
        return self.first + int(-(-(sample - self.first_sample) * (self.last - self.first) // size))


@dataclass(frozen=True)
class Curve:
    """The learning rate and weight decay of one param_group in one phase.

    Point i has the values of the step after ``iterations[i]`` finished iterations.

    Args:
        label: Name of the phase in the legend.
        phase: 1 for the checkpoint's run, 2 for the resumed one.
        group: Position of the param_group in its optimizer.
        iterations: Number of finished iterations at each point.
        samples: The scheduler's position at each point, in samples.
        lr: Learning rate at each point.
        weight_decay: Weight decay at each point.
        optimizer: Position of the optimizer in its chain.
    """

    label: str
    phase: Literal[1, 2]
    group: int
    iterations: tuple[int, ...]
    samples: tuple[int, ...]
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    optimizer: int = 0


def phase_curves(
    label: str,
    phase: Literal[1, 2],
    values: ScheduleValues,
    optimizers: Sequence[Sequence[Mapping[str, Any]]],
    span: Span,
) -> tuple[Curve, ...]:
    """Compute the curves of all param_groups of a phase.

    Args:
        label: Name of the phase in the legend.
        phase: 1 or 2.
        values: The arguments of its scheduler.
        optimizers: The param_groups of each optimizer of the chain.
        span: The iterations of the curves.

    Returns:
        One curve for each param_group, in order.

    Raises:
        PlanError: Megatron's scheduler does not accept the values.
    """
    iterations = points(values, span)
    samples = [span.sample(i) for i in iterations]
    places = [(n, i, g) for n, groups in enumerate(optimizers) for i, g in enumerate(groups)]
    found = scheduled(values, [group for _, _, group in places], samples)
    return tuple(
        Curve(
            label=label,
            phase=phase,
            group=index,
            iterations=tuple(iterations),
            samples=tuple(samples),
            lr=tuple(at[place][0] for at in found),
            weight_decay=tuple(at[place][1] for at in found),
            optimizer=number,
        )
        for place, (number, index, _) in enumerate(places)
    )


def points(values: ScheduleValues, span: Span) -> list[int]:
    """Choose iterations that show a schedule's form: evenly spread, and around each corner.

    Args:
        values: The arguments of the scheduler.
        span: The iterations to choose from.
    """
    length = span.last - span.first
    corners = {span.first, span.last}
    for sample in _corners(values):
        near = span.iteration(sample)
        corners |= {i for i in (near - 1, near, near + 1) if span.first <= i <= span.last}
    evenly = max(1, min(length, LIMIT - len(corners)))
    return sorted(corners | {span.first + length * i // evenly for i in range(evenly)})


def _corners(values: ScheduleValues) -> Iterable[float]:
    """Yield the positions at which the schedule changes its form, in samples."""
    yield values.lr_warmup_steps
    yield values.lr_decay_steps
    yield values.wd_incr_steps
    if values.lr_decay_style == "WSD" and values.wsd_decay_steps is not None:
        yield values.lr_decay_steps - values.wsd_decay_steps
