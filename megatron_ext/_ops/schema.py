r"""The ops of the ``megatron_ext`` namespace: schemas, fake kernels and default kernels.

The default kernels are the reference in plain torch. The libraries of ``csrc/`` add kernels for the
CPU and CUDA dispatch keys, which the dispatcher prefers if they are loaded.

transform_moments\_
    Apply the segment table (`.segments`) in place to the lists of exp_avg and exp_avg_sq. Their
    tensors are float32, bfloat16 or float16, contiguous and on one device, and the two of a pair
    have the same length. Returns float64 ``[tensors, 2, 5]`` on their device
    (`.segments.STATISTICS_COLUMNS` for exp_avg and exp_avg_sq), or ``[0, 2, 5]`` if ``statistics``
    is `Statistics.NONE`. Only elements of segments count. The call makes its table each time, which
    a CUDA graph cannot capture.
launch_table
    Check the same arguments once and build the table that the kernel reads: uint8 on the tensors'
    device, and its header, int64 ``[5]`` on the CPU. The table has the tensors' addresses. Whoever
    keeps it has to keep the tensors, as `.transform.Transform` does. Both are empty for the
    reference, which needs none.
transform_prepared\_
    Do the same by a table and its header. There is no list of tensors, no copy and no
    synchronization: the call is one launch, which a CUDA graph can capture. The tensors that it
    writes are no arguments. For torch it changes ``table``.
compare_weights
    Round each element of ``master`` to the dtype of ``weights`` and compare the bits; a NaN equals
    every other. The lists have tensors as above, in pairs of one length. Returns int64
    ``[tensors, 2]`` on their device: the number of elements that differ, and the fp32 bits of the
    largest absolute difference, ignoring NaN. Nothing is written but the result, and every element
    is read once.
magnitude_histogram
    Compute one level of a radix select over abs(x). Of the elements whose leading bits equal their
    group's prefix, it counts the values of the next bits: int64 ``[groups, 2048]``. ``ranges`` is
    int64 ``[n, 4]`` on the CPU: tensor, begin, end, group. ``prefixes`` is int64 ``[groups]`` on
    the tensors' device. Levels 0, 1 and 2 sort by 11, 10 and 10 of the 31 bits of the fp32
    magnitude. NaN counts as the largest value.

Raises (every kernel, before an element is written):
    RuntimeError: The lists have different lengths; a tensor is not contiguous, or has another dtype
    or device; tensors share memory; a table has another shape; a segment is outside its tensor;
    segments overlap; a rule is unknown.
"""

from __future__ import annotations

import torch

from . import reference
from .segments import STATISTICS_COLUMNS

NAMESPACE = "megatron_ext"
OPS = {
    "transform_moments_": (
        "(Tensor(a!)[] exp_avg, Tensor(b!)[] exp_avg_sq, Tensor segments, Tensor coefficients, "
        "int statistics) -> Tensor"
    ),
    "launch_table": (
        "(Tensor[] exp_avg, Tensor[] exp_avg_sq, Tensor segments, Tensor coefficients) "
        "-> (Tensor, Tensor)"
    ),
    "transform_prepared_": "(Tensor(a!) table, Tensor header, int statistics) -> Tensor",
    "compare_weights": "(Tensor[] master, Tensor[] weights) -> Tensor",
    "magnitude_histogram": (
        "(Tensor[] tensors, Tensor ranges, Tensor prefixes, int level) -> Tensor"
    ),
}

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
) -> torch.Tensor:
    like = exp_avg[0] if exp_avg else segments
    rows = len(exp_avg) if statistics else 0
    return like.new_empty((rows, 2, len(STATISTICS_COLUMNS)), dtype=torch.float64)


def _fake_compare_weights(master: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
    device = master[0].device if master else torch.device("cpu")
    return torch.empty(len(master), 2, dtype=torch.int64, device=device)


def _fake_magnitude_histogram(
    tensors: list[torch.Tensor], ranges: torch.Tensor, prefixes: torch.Tensor, level: int
) -> torch.Tensor:
    return prefixes.new_empty((prefixes.shape[0], reference.BINS), dtype=torch.int64)


for _name, _fake in (
    ("transform_moments_", _fake_transform_moments),
    ("compare_weights", _fake_compare_weights),
    ("magnitude_histogram", _fake_magnitude_histogram),
):
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _fake)
