"""Bind a segment table to its tensors."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..rules.registry import COEFFICIENTS
from . import schema as schema
from .segments import COLUMNS, Segment, Statistics, encode


@dataclass(frozen=True)
class Transform:
    """A segment table bound to its tensors, which can be applied any number of times.

    `prepare` checks the table and copies it to the device once. Each application is then one launch
    without a list of tensors, a copy or a synchronization, which a CUDA graph can capture. Keep the
    prepared transform as long as the graph. A graph that outlives it stops with an error on the
    device.

    Args:
        exp_avg: The first moments. They are written in place.
        exp_avg_sq: The second moments, one per tensor of `exp_avg` and of the same length. They are
            written in place.
        segments: The int64 table (`encode`).
        coefficients: The float64 table.
        prepared: The result of ``launch_table``. None if the table is made at every call, and for
            the reference, which needs none.
    """

    exp_avg: tuple[torch.Tensor, ...]
    exp_avg_sq: tuple[torch.Tensor, ...]
    segments: torch.Tensor
    coefficients: torch.Tensor
    prepared: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(
        cls,
        exp_avg: Sequence[torch.Tensor],
        exp_avg_sq: Sequence[torch.Tensor],
        segments: Sequence[Segment],
    ) -> Transform:
        """Bind segments to tensors."""
        return cls(tuple(exp_avg), tuple(exp_avg_sq), *encode(segments))

    @classmethod
    def keep(cls, exp_avg: Sequence[torch.Tensor], exp_avg_sq: Sequence[torch.Tensor]) -> Transform:
        """Bind a table that changes nothing, for the statistics. Each tensor is one segment."""
        table = torch.zeros(len(exp_avg), len(COLUMNS), dtype=torch.int64)
        table[:, COLUMNS.index("tensor")] = torch.arange(len(exp_avg))
        table[:, COLUMNS.index("end")] = torch.tensor([x.numel() for x in exp_avg])
        coefficients = torch.zeros(len(exp_avg), 2 * COEFFICIENTS, dtype=torch.float64)
        return cls(tuple(exp_avg), tuple(exp_avg_sq), table, coefficients)

    def prepare(self) -> Transform:
        """Return the transform with its table on the device.

        Raises:
            RuntimeError: An argument is invalid (see `.schema`), or a CUDA graph is being captured.
        """
        table, header = torch.ops.megatron_ext.launch_table(
            self.exp_avg, self.exp_avg_sq, self.segments, self.coefficients
        )
        if not len(header):  # the reference
            return self
        out = replace(self, prepared=(table, header))
        if table.is_cuda:
            weakref.finalize(out, _end, table).atexit = False
        return out

    def __call__(self, statistics: Statistics = Statistics.NONE) -> torch.Tensor:
        """Apply the rules in place.

        Returns:
            float64 ``[tensors, 2, 5]`` (`.segments.STATISTICS_COLUMNS`), ``[0, 2, 5]`` for
            `Statistics.NONE`; on the tensors' device, not synchronized.

        Raises:
            RuntimeError: An argument is invalid (see `.schema`). No element has been written.
        """
        out: torch.Tensor
        if self.prepared is not None:
            out = torch.ops.megatron_ext.transform_prepared_(*self.prepared, int(statistics))
            return out
        out = torch.ops.megatron_ext.transform_moments_(
            self.exp_avg, self.exp_avg_sq, self.segments, self.coefficients, int(statistics)
        )
        return out


def _end(table: torch.Tensor) -> None:
    """Take the mark off a table, so that a graph that is replayed without its transform stops."""
    if not torch.cuda.is_current_stream_capturing():
        table[:8].zero_()
