"""The operations that are measured, as rules, and the bytes that they cannot do without."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_ext._ops.segments import Segment, Statistics, encode
from megatron_ext.rules.base import ElementRule
from megatron_ext.rules.batch_size import BatchSize
from megatron_ext.rules.elementwise import Fill, Keep, Scale

Rules = tuple[ElementRule, ElementRule]
RESCALE, RESET, BATCH_SIZE, THRESHOLDS = "rescale", "reset", "batch size", "thresholds"
COMPARE = "compare weights"

#: Factors of two successive calls: nothing grows or vanishes, however often they are called.
TURNS = (1.0001, 1 / 1.0001)
#: For comparing results: a factor whose effect no rounding hides.
CHECKED = (4.0,)
#: Exact in fp32, as which torch.quantile takes it.
QUANTILE = 0.875


@dataclass(frozen=True)
class State:
    """The moments that an operation writes, and room for the limits.

    Args:
        exp_avg: As `megatron_ext._ops.Transform` takes it.
        exp_avg_sq: As many.
        scratch: Two tensors of as many elements as exp_avg has in all; none for a check.
    """

    exp_avg: list[torch.Tensor]
    exp_avg_sq: list[torch.Tensor]
    scratch: tuple[torch.Tensor, ...] = ()

    @classmethod
    def make(
        cls,
        sizes: Sequence[int],
        device: str,
        seed: int,
        dtype: str = "float32",
        scratch: bool = True,
    ) -> State:
        """Moments of gradients of about 1e-3, some of them with more signal than noise.

        In float16 they are about 1, because it has no square of 1e-3.
        """
        generator = torch.Generator(device).manual_seed(seed)
        stored, width = getattr(torch, dtype), 1.0 if dtype == "float16" else 1e-3

        def normal(n: int) -> torch.Tensor:
            x = torch.empty(n, dtype=stored, device=device)
            return x.normal_(0.0, width, generator=generator)

        m = [normal(n) for n in sizes]
        v = [normal(n).square_() for n in sizes]
        room = functools.partial(torch.ones, sum(sizes), dtype=stored, device=device)
        return cls(m, v, tuple(room() for _ in range(2 * scratch)))

    def clone(self) -> State:
        """A copy without scratch."""
        return State([x.clone() for x in self.exp_avg], [x.clone() for x in self.exp_avg_sq])

    @property
    def both(self) -> list[torch.Tensor]:
        """exp_avg, then exp_avg_sq."""
        return [*self.exp_avg, *self.exp_avg_sq]


@dataclass(frozen=True)
class Operation:
    """What is done to the moments.

    Args:
        kind: `RESCALE`, `RESET`, `BATCH_SIZE`, `THRESHOLDS` or `COMPARE`.
        statistics: What is counted meanwhile.
        traffic: Bytes that have to move in fp32, for one element of exp_avg and one of exp_avg_sq
            (of exp_avg alone for `THRESHOLDS` and `COMPARE`), by name.
        rules: Rules for a factor; None for `THRESHOLDS` and `COMPARE`, which change nothing.
    """

    kind: str
    statistics: Statistics
    traffic: tuple[tuple[str, int], ...]
    rules: Callable[[float], Rules] | None = None

    @property
    def name(self) -> str:
        """For the report and the command line."""
        return self.kind + _NAMES[self.statistics]


_NAMES = {
    Statistics.NONE: "",
    Statistics.AFTER: ", statistics after",
    Statistics.BEFORE_AND_AFTER: ", statistics before and after",
}


def _rescale(factor: float) -> Rules:
    return Scale(factor), Scale(factor * factor)


def _reset(_: float) -> Rules:
    return Fill(0.0), Fill(0.0)


def _batch_size(factor: float) -> Rules:
    return Keep(), BatchSize(factor, (0.9, 0.95), 20)


#: In the order in which they run; the reset is last because it leaves nothing.
OPERATIONS = (
    *(
        Operation(RESCALE, s, (("read and write m, v", 16),), _rescale)
        for s in (Statistics.NONE, Statistics.AFTER, Statistics.BEFORE_AND_AFTER)
    ),
    *(
        Operation(BATCH_SIZE, s, (("read m, read and write v", 12),), _batch_size)
        for s in (Statistics.NONE, Statistics.BEFORE_AND_AFTER)
    ),
    Operation(THRESHOLDS, Statistics.NONE, (("three histograms, read m", 12),)),
    Operation(COMPARE, Statistics.NONE, (("read master and bf16 weight", 6),)),
    Operation(RESET, Statistics.NONE, (("write m, v", 8),), _reset),
)


def segments(sizes: Sequence[int], rules: Rules) -> list[Segment]:
    """One segment a tensor, all with the same rules."""
    return [Segment(i, 0, n, *rules) for i, n in enumerate(sizes)]


def coefficients(rules: Rules) -> list[float]:
    """Those of the rule for exp_avg_sq, as the op takes them."""
    return encode([Segment(0, 0, 1, *rules)])[1][0, 6:].tolist()
