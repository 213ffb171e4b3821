"""A chain of phases, each with other hyperparameters, another change of the moments and format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from .harness import Hyper

FORMATS = ("dp_reshardable", "fully_reshardable", "torch")
#: Policy -> factors of exp_avg and exp_avg_sq; powers of two round nothing.
FACTORS = {
    "preset: keep": (1.0, 1.0),
    "moments: [{match: '*', exp_avg: scale 2, exp_avg_sq: scale 4}]": (2.0, 4.0),
    "preset: reset": (0.0, 0.0),
}


@dataclass(frozen=True)
class Phase:
    """One phase of two ranks.

    Args:
        hyper: Its hyperparameters.
        moments: Key of `FACTORS`.
        saved_as: Format of the checkpoint at its end.
    """

    hyper: Hyper
    moments: str
    saved_as: str


def phases(count: int) -> Iterator[Phase]:
    """The phases of a chain; the first one starts from nothing."""
    moments = list(FACTORS)
    for number in range(count):
        yield Phase(
            Hyper(
                lr=3e-3 / (1 + number % 7),
                min_lr=1e-5 * (1 + number % 3),
                weight_decay=(0.1, 0.01, 0.2, 0.0)[number % 4],
                betas=(0.9 - 0.05 * (number % 5), 0.95 + 0.01 * (number % 3)),
                eps=(1e-8, 1e-7)[number % 2],
                train_iters=4 * count,
                decay_style=("cosine", "linear", "constant")[number % 3],
            ),
            # A reset now and then; the moments would otherwise grow without bound.
            moments[2 if number % 11 == 10 else number % 2],
            FORMATS[number % 3],
        )


def resident() -> int:
    """Bytes of memory that this process holds (proc(5), statm)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
