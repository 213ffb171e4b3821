r"""A model of what a resume takes, fitted to what was measured, and what it predicts elsewhere.

.. math:: t = c L + R / B_r + T / B_t

L: layers of the model; R: bytes that a rank reads; T: bytes of exp_avg and exp_avg_sq that its
passes over them read and write; c: what a layer's tensors cost whatever their size. On one machine
the constants are fitted, c and B_r for stock's reader and for ours; for many GPUs the bandwidths
are assumptions that stand beside the prediction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cases import KEEP, RESCALE, RESET, SIZES, STOCK, Case
from .summary import LOAD, median

#: Bytes that a rescale of both fp32 moments moves for one parameter: two are read and written.
TRANSFORM_BYTES = 16
#: Bytes moved for one parameter by all passes after the read: both moments are looked at once; or
#: rescaled, which is a look too; or filled with zeros, looked at, and reset.
PASSES = {STOCK: 0, KEEP: 8, RESCALE: TRANSFORM_BYTES, RESET: 8 + 8 + 8}


@dataclass(frozen=True)
class Reader:
    """The constants of stock's reader or of ours.

    Args:
        layer: c, seconds.
        read: B_r, bytes a second.
    """

    layer: float
    read: float


@dataclass(frozen=True)
class Fit:
    """The constants of one machine.

    Args:
        stock: Of stock's reader.
        ours: Of ours.
        moved: B_t, bytes a second.
        residuals: For each measured point its name, seconds measured and by the model.
    """

    stock: Reader
    ours: Reader
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
            _, layers = SIZES[case.size]
            own = [layers, read]
            rows.append([*own, 0, 0, moved] if variant == STOCK else [0, 0, *own, moved])
            seconds.append(
                median(samples, variant, lambda s: sum(s["seconds"].get(p, 0.0) for p in LOAD))
            )
    matrix, wanted = np.array(rows, dtype=float), np.array(seconds)
    weighted = matrix / wanted[:, None]
    scale = np.abs(weighted).max(axis=0)
    solution = np.linalg.lstsq(weighted / scale, np.ones(len(wanted)), rcond=None)[0] / scale
    predicted = matrix @ solution
    values = [float(x) for x in solution]
    return Fit(
        Reader(values[0], _bandwidth(values[1])),
        Reader(values[2], _bandwidth(values[3])),
        _bandwidth(values[4]),
        tuple(zip(names, seconds, map(float, predicted), strict=True)),
    )


def _bandwidth(seconds_a_byte: float) -> float:
    return 1.0 / seconds_a_byte if seconds_a_byte > 0 else float("inf")


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
