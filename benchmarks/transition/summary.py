"""A few numbers for each variant, and how far they differ between seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Losses = Sequence[float]

#: Iterations over which the loss is averaged before it is compared.
WINDOW = 5
#: Iterations in which the rise after the change is looked for.
EARLY = 40
LAST = 50


@dataclass(frozen=True)
class Spread:
    """Mean over the seeds, and the largest distance of one from it."""

    mean: float
    largest_distance: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value a seed."""
        mean = statistics.fmean(values)
        return cls(mean, max(abs(v - mean) for v in values))

    def __str__(self) -> str:
        """Mean and distance, to four decimals."""
        return f"{self.mean:+.4f} +- {self.largest_distance:.4f}"

    @property
    def is_told_apart(self) -> bool:
        """Whether no seed has the other sign."""
        return abs(self.mean) > self.largest_distance


@dataclass(frozen=True)
class Summary:
    """One variant against its baseline with the same data, seed by seed.

    Args:
        rise: Largest loss above the baseline's in the first `EARLY` iterations, both averaged over
            `WINDOW`.
        early: Mean loss above the baseline's in these iterations.
        late: Mean loss above the baseline's in the last `LAST` iterations.
        behind: Iterations until, after the rise, the average is first no longer above the
            baseline's; all of them where it never is.
    """

    rise: Spread
    early: Spread
    late: Spread
    behind: Spread


def summarise(losses: Mapping[int, Losses], baseline: Mapping[int, Losses]) -> Summary:
    """Compare runs with the baseline's of the same seed.

    Args:
        losses: Seed -> loss of each iteration of phase 2.
        baseline: The same for the baseline.
    """
    rise, early, late, behind = [], [], [], []
    for seed, mine in losses.items():
        above = [a - b for a, b in zip(mine, baseline[seed], strict=True)]
        smooth = averaged(above)
        rise.append(max(smooth[:EARLY]))
        early.append(statistics.fmean(above[:EARLY]))
        late.append(statistics.fmean(above[-LAST:]))
        top = smooth.index(rise[-1])
        caught_up = (i for i, x in enumerate(smooth) if i >= top and x <= 0.0)
        behind.append(float(next(caught_up, len(smooth))))
    return Summary(*(Spread.of(x) for x in (rise, early, late, behind)))


def averaged(values: Sequence[float]) -> list[float]:
    """Mean over the last `WINDOW` values, fewer at the start."""
    windows = [values[max(0, i - WINDOW + 1) : i + 1] for i in range(len(values))]
    return [statistics.fmean(w) for w in windows]
