r"""The ops of the ``megatron_ext`` namespace: schemas, fake kernels and default kernels.

The default kernels are the reference in plain torch; the libraries of ``csrc/`` add kernels for
the CPU and CUDA dispatch keys, which the dispatcher prefers where they are loaded.

transform_moments\_
    Apply the segment table (`.segments`) to the lists of exp_avg and exp_avg_sq (float32, bfloat16
    or float16, contiguous, on one device; the two of a pair equally long), in place. Returns
    float64 ``[tensors, 2, 5]`` on their device (`.segments.STATISTICS_COLUMNS` for exp_avg and
    exp_avg_sq), or ``[0, 2, 5]`` where ``statistics`` is `Statistics.NONE`. Only elements of
    segments count. ``device_table`` and ``host_table`` are what ``launch_table`` returned for the
    same arguments; without them the table is made in the call, which a CUDA graph cannot capture.
launch_table
    The table as the CUDA kernel reads it, uint8, on the device and on the host (empty on the CPU).
    It holds the tensors' addresses: it is good for these tensors only, and ``transform_moments_``
    refuses it for others.
magnitude_histogram
    One level of a radix select over abs(x): int64 ``[groups, 2048]`` counts, by the next bits, of
    the elements whose leading bits equal their group's prefix. ``ranges`` is int64 ``[n, 4]`` on
    the CPU: tensor, begin, end, group; ``prefixes`` int64 ``[groups]`` on the tensors' device.
    Levels 0, 1, 2 sort by 11, 10, 10 of the 31 bits of the fp32 magnitude. NaN counts as the
    largest.

Raises (every kernel, before an element is written):
    RuntimeError: Lists of different length, tensors that are not contiguous, of another dtype, on
    different devices or sharing memory; a table of another shape; a segment outside its tensor;
    segments that overlap; an unknown rule.
"""

from __future__ import annotations

import torch

from . import reference
from .segments import STATISTICS_COLUMNS

NAMESPACE = "megatron_ext"
OPS = {
    "transform_moments_": (
        "(Tensor(a!)[] exp_avg, Tensor(b!)[] exp_avg_sq, Tensor segments, Tensor coefficients, "
        "int statistics, Tensor? device_table=None, Tensor? host_table=None) -> Tensor"
    ),
    "launch_table": (
        "(Tensor[] exp_avg, Tensor[] exp_avg_sq, Tensor segments, Tensor coefficients) "
        "-> (Tensor, Tensor)"
    ),
    "magnitude_histogram": (
        "(Tensor[] tensors, Tensor ranges, Tensor prefixes, int level) -> Tensor"
    ),
}

#: Bytes of the launch table: a header, a record a segment, a chunk number a tensor (static_assert
#: in csrc/cuda/ops.cpp).
TABLE_BYTES = {"header": 16, "segment": 160, "tensor": 8}

_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in OPS.items():
    _library.define(_name + _schema)
    _library.impl(_name, getattr(reference, _name), "CompositeExplicitAutograd")


def _fake_transform_moments(
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    segments: torch.Tensor,
    coefficients: torch.Tensor,
    statistics: int,
    device_table: torch.Tensor | None = None,
    host_table: torch.Tensor | None = None,
) -> torch.Tensor:
    like = exp_avg[0] if exp_avg else segments
    rows = len(exp_avg) if statistics else 0
    return like.new_empty((rows, 2, len(STATISTICS_COLUMNS)), dtype=torch.float64)


def _fake_launch_table(
    exp_avg: list[torch.Tensor],
    exp_avg_sq: list[torch.Tensor],
    segments: torch.Tensor,
    coefficients: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    size = 0
    if exp_avg and exp_avg[0].device.type == "cuda":
        b = TABLE_BYTES
        size = b["header"] + b["segment"] * segments.shape[0] + b["tensor"] * (len(exp_avg) + 1)
    device = exp_avg[0].device if exp_avg else segments.device
    return (
        torch.empty(size, dtype=torch.uint8, device=device),
        torch.empty(size, dtype=torch.uint8, device=segments.device),
    )


def _fake_magnitude_histogram(
    tensors: list[torch.Tensor], ranges: torch.Tensor, prefixes: torch.Tensor, level: int
) -> torch.Tensor:
    return prefixes.new_empty((prefixes.shape[0], reference.BINS), dtype=torch.int64)


for _name, _fake in (
    ("transform_moments_", _fake_transform_moments),
    ("launch_table", _fake_launch_table),
    ("magnitude_histogram", _fake_magnitude_histogram),
):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake)
