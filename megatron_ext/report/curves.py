"""Learning rate and weight decay of a phase, iteration by iteration. Pure.

The numbers are those of Megatron's own scheduler, which is run over the phase without an optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..host.schedule import ScheduleValues, scheduled

#: Most points of a curve, however long the run.
LIMIT = 400


@dataclass(frozen=True)
class Span:
    """The iterations that a curve is drawn for.

    Args:
        first: Iterations done where it begins.
        last: Iterations done where it ends.
        first_sample: The scheduler's position at `first`, in samples.
        last_sample: At `last`.
    """

    first: int
    last: int
    first_sample: int
    last_sample: int

    def sample(self, iteration: int) -> int:
        """The scheduler's position after some iterations, in samples; all batches are alike."""
        done = (iteration - self.first) * (self.last_sample - self.first_sample)
        return self.first_sample + (done // (self.last - self.first) if done else 0)

    def iteration(self, sample: float) -> int:
        """The first iteration at which the scheduler is at a position or past it."""
        size = self.last_sample - self.first_sample
        if size <= 0:
            return self.first
        return self.first + int(-(-(sample - self.first_sample) * (self.last - self.first) // size))


@dataclass(frozen=True)
class Curve:
    """What one param_group is given in one phase.

    Point i is what the step after ``iterations[i]`` finished iterations uses.

    Args:
        label: What the phase is called, for people.
        phase: 1: the checkpoint's run. 2: the resumed one.
        group: Position of the param_group in its optimizer.
        iterations: Finished iterations.
        samples: The scheduler's position, in samples.
        lr: Learning rate at each point.
        weight_decay: Weight decay at each point.
        optimizer: Number of the optimizer in its chain.
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
    """The curves of all param_groups of a phase.

    Args:
        label: What the phase is called, for people.
        phase: 1 or 2.
        values: What its scheduler is built with.
        optimizers: For each optimizer of the chain its param_groups.
        span: The iterations to look at.

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
    """Iterations that show a schedule's form: evenly spread, and both sides of each corner.

    Args:
        values: What the scheduler is built with.
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
    """Where the schedule changes its form, in samples."""
    yield values.lr_warmup_steps
    yield values.lr_decay_steps
    yield values.wd_incr_steps
    if values.lr_decay_style == "WSD" and values.wsd_decay_steps is not None:
        yield values.lr_decay_steps - values.wsd_decay_steps
