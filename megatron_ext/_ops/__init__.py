"""The fused moment ops: schemas, the reference kernel, and the compiled kernels of ``csrc/``.

`Transform`, `weight_differences` and `magnitude_thresholds` are the entry points; the ops
themselves are ``torch.ops.megatron_ext.*`` (see `.schema`).
"""

from __future__ import annotations

from . import schema
from .native import DEVICES, Kernel, is_native, kernel
from .quantiles import magnitude_thresholds, magnitude_thresholds_of
from .segments import Segment, Statistics
from .transform import Transform
from .weights import weight_differences

__all__ = [
    "DEVICES",
    "Kernel",
    "Segment",
    "Statistics",
    "Transform",
    "is_native",
    "kernel",
    "magnitude_thresholds",
    "magnitude_thresholds_of",
    "schema",
    "weight_differences",
]
