"""The fused moment ops: schemas, the reference kernel, and the compiled kernels of ``csrc/``.

`Transform` and `magnitude_thresholds` are the entry points; the ops themselves are
``torch.ops.megatron_ext.*`` (see `.schema`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..rules.registry import COEFFICIENTS
from . import reference
from .native import DEVICES, Kernel, is_native, kernel
from .segments import COLUMNS, Segment, Statistics, encode

__all__ = [
    "DEVICES",
    "Kernel",
    "Segment",
    "Statistics",
    "Transform",
    "is_native",
    "kernel",
    "magnitude_thresholds",
    "schema",
]


@dataclass(frozen=True)
class Transform:
    """A segment table bound to the tensors it is for, ready to be applied any number of times.

    `prepare` copies the table to the device once; applying it afterwards is one launch without a
    copy or a synchronization, which a CUDA graph can capture.

    Args:
        exp_avg: Written in place.
        exp_avg_sq: Written in place; as many, each as long as its exp_avg.
        segments: int64 table (`encode`).
        coefficients: float64 table.
        tables: What ``launch_table`` returned; None: made at every call.
    """

    exp_avg: tuple[torch.Tensor, ...]
    exp_avg_sq: tuple[torch.Tensor, ...]
    segments: torch.Tensor
    coefficients: torch.Tensor
    tables: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(
        cls,
        exp_avg: Sequence[torch.Tensor],
        exp_avg_sq: Sequence[torch.Tensor],
        segments: Sequence[Segment],
    ) -> Transform:
        """Encode the segments."""
        return cls(tuple(exp_avg), tuple(exp_avg_sq), *encode(segments))

    @classmethod
    def keep(cls, exp_avg: Sequence[torch.Tensor], exp_avg_sq: Sequence[torch.Tensor]) -> Transform:
        """Change nothing, for the statistics alone; one segment for each tensor."""
        table = torch.zeros(len(exp_avg), len(COLUMNS), dtype=torch.int64)
        table[:, COLUMNS.index("tensor")] = torch.arange(len(exp_avg))
        table[:, COLUMNS.index("end")] = torch.tensor([x.numel() for x in exp_avg])
        coefficients = torch.zeros(len(exp_avg), 2 * COEFFICIENTS, dtype=torch.float64)
        return cls(tuple(exp_avg), tuple(exp_avg_sq), table, coefficients)

    def prepare(self) -> Transform:
        """The same with its table on the device."""
        tables = torch.ops.megatron_ext.launch_table(
            self.exp_avg, self.exp_avg_sq, self.segments, self.coefficients
        )
        return Transform(
            self.exp_avg, self.exp_avg_sq, self.segments, self.coefficients, tuple(tables)
        )

    def __call__(self, statistics: Statistics = Statistics.NONE) -> torch.Tensor:
        """Apply the rules in place.

        Returns:
            float64 ``[tensors, 2, 5]`` (`.segments.STATISTICS_COLUMNS`), ``[0, 2, 5]`` for
            `Statistics.NONE`; on the tensors' device, not synchronized.

        Raises:
            RuntimeError: See `.schema`; nothing has been written.
        """
        out: torch.Tensor = torch.ops.megatron_ext.transform_moments_(
            self.exp_avg,
            self.exp_avg_sq,
            self.segments,
            self.coefficients,
            int(statistics),
            *(self.tables or ()),
        )
        return out


def magnitude_thresholds(
    tensors: Sequence[torch.Tensor],
    ranges: torch.Tensor,
    quantiles: torch.Tensor,
    reduce: Callable[[torch.Tensor], object] | None = None,
) -> torch.Tensor:
    r"""The p-quantile of abs(x), per group of ranges, exactly and without sorting.

    A radix select in three histograms over the 31 bits of the fp32 magnitude: the k-th smallest
    value for :math:`k = \lfloor p (n - 1) \rfloor`, which is numpy's ``method="lower"``. NaN counts
    as the largest. Works on any number of elements (torch.quantile stops at 16M in most versions).

    Args:
        tensors: float32, bfloat16 or float16, contiguous, on one device.
        ranges: int64 ``[n, 4]`` on the CPU: tensor, begin, end, group.
        quantiles: float64 ``[groups]``, p of each group, in [0, 1].
        reduce: Called with each histogram (int64 ``[groups, 2048]``) to add up those of other
            ranks, in place; three calls of 16 KiB a group.

    Returns:
        float32 ``[groups]`` on the tensors' device; 0 for a group without elements.

    Raises:
        RuntimeError: A quantile outside [0, 1], or what `.schema` lists.
    """
    if not bool(((quantiles >= 0) & (quantiles <= 1)).all()):
        raise RuntimeError(f"quantiles must be between 0 and 1, not {quantiles.tolist()}")
    device = tensors[0].device if tensors else torch.device("cpu")
    prefixes = torch.zeros(len(quantiles), dtype=torch.int64, device=device)
    rank = None
    for level, (bits, _) in enumerate(reference.LEVELS):
        counts = torch.ops.megatron_ext.magnitude_histogram(tensors, ranges, prefixes, level)
        if reduce is not None:
            reduce(counts)
        up_to = counts.cumsum(1)
        if rank is None:
            last = (up_to[:, -1] - 1).clamp(min=0).double()
            rank = (quantiles.to(device) * last).floor().long()
        bin_ = (up_to <= rank[:, None]).sum(1).clamp(max=(1 << bits) - 1)
        below = torch.where(bin_ > 0, up_to.gather(1, (bin_ - 1).clamp(min=0)[:, None])[:, 0], 0)
        rank = rank - below
        prefixes = (prefixes << bits) | bin_
        if level == 0:
            empty = up_to[:, -1] == 0
    return torch.where(empty, 0.0, prefixes.int().view(torch.float32))
