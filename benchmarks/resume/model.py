r"""A model of what a resume takes, fitted to what was measured, and what it predicts elsewhere.

.. math:: t = c + R / B_r + T / B_t

R: bytes that a rank reads; T: bytes of exp_avg and exp_avg_sq that its passes over them read and
write; c: what does not grow with the size. On one machine the three constants are fitted; for many
GPUs the bandwidths are assumptions that stand beside the prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cases import KEEP, RESCALE, RESET, STOCK, Case
from .summary import LOAD, median

#: Bytes that a rescale of both fp32 moments moves for one parameter: two are read and written.
TRANSFORM_BYTES = 16
#: Bytes moved for one parameter by all passes after the read: both moments are looked at once, then
#: rescaled; or filled with zeros, looked at, and reset.
PASSES = {STOCK: 0, KEEP: 8, RESCALE: 8 + TRANSFORM_BYTES, RESET: 8 + 8 + 8}


@dataclass(frozen=True)
class Fit:
    """The constants of one machine.

    Args:
        fixed: c, seconds.
        read: B_r, bytes a second.
        moved: B_t, bytes a second.
        residuals: For each measured point its name, seconds measured and by the model.
    """

    fixed: float
    read: float
    moved: float
    residuals: tuple[tuple[str, float, float], ...]


def fit(series: Sequence[tuple[Case, Mapping[str, Any]]]) -> Fit:
    """Fit to the series of one format on one rank; relative errors count the same at every size."""
    names, rows, seconds = [], [], []
    for case, result in series:
        for variant, passes in PASSES.items():
            samples = result["samples"]
            read = median(samples, variant, lambda s: s["stored"])
            moved = passes * result["parameters"]
            names.append(f"{case}, {variant}")
            rows.append([1.0, read, float(moved)])
            seconds.append(
                median(samples, variant, lambda s: sum(s["seconds"].get(p, 0.0) for p in LOAD))
            )
    matrix, wanted = np.array(rows), np.array(seconds)
    weighted = matrix / wanted[:, None]
    scale = np.abs(weighted).max(axis=0)
    solution = np.linalg.lstsq(weighted / scale, np.ones(len(wanted)), rcond=None)[0] / scale
    predicted = matrix @ solution
    fixed, per_read, per_moved = (float(x) for x in solution)
    return Fit(
        fixed,
        1.0 / per_read if per_read > 0 else float("inf"),
        1.0 / per_moved if per_moved > 0 else float("inf"),
        tuple(zip(names, seconds, map(float, predicted), strict=True)),
    )


@dataclass(frozen=True)
class Cluster:
    """Assumptions about a machine that was not measured.

    Args:
        gpus: How many.
        storage: Bytes a second that all of them read together.
        memory: Bytes a second that one GPU's memory gives to the fused op.
        fixed: Seconds that do not grow with the model.
    """

    gpus: int
    storage: float = 200e9
    memory: float = 0.9 * 3.35e12
    fixed: float = 1.0


@dataclass(frozen=True)
class Prediction:
    """One model on one cluster; seconds."""

    parameters: float
    cluster: Cluster
    read_keep: float
    read_reset: float
    transform: float

    @property
    def share(self) -> float:
        """Of the transform in a resume that keeps all and rescales."""
        return self.transform / (self.cluster.fixed + self.read_keep + self.transform)


def predict(parameters: float, cluster: Cluster) -> Prediction:
    """Bf16 weights, fp32 masters and moments, each byte read once (fully parallel load)."""
    return Prediction(
        parameters,
        cluster,
        read_keep=14 * parameters / cluster.storage,
        read_reset=6 * parameters / cluster.storage,
        transform=TRANSFORM_BYTES * parameters / cluster.gpus / cluster.memory,
    )
