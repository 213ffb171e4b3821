"""Every moment rule in numpy and float64, from its published formula: no code of the rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_ext.rules.base import Rule
from megatron_ext.rules.batch_size import BatchRatio, BatchSize
from megatron_ext.rules.bias_consistent import BiasConsistent
from megatron_ext.rules.clip import Clip
from megatron_ext.rules.elementwise import Fill, Floor, Keep, Scale
from megatron_ext.rules.fill_from import FillFrom
from megatron_ext.rules.mean_of import MeanOf
from megatron_ext.rules.prune import Prune, PruneMagnitude, PruneRandom

#: What the moments of the cases were made with, and what the resume goes on with.
STEP, NEXT_STEP = 100, 7
BETAS, NEXT_BETAS = (0.9, 0.95), (0.8, 0.9)


@dataclass(frozen=True)
class Elements:
    """One moment of a whole parameter, flattened.

    Args:
        x: The moment, float64.
        exp_avg: exp_avg of the same elements, float64.
        index: Of each in the unsharded parameter.
        parameter: 64-bit number of the parameter.
        key: Which moment `x` is.
    """

    x: np.ndarray
    exp_avg: np.ndarray
    index: np.ndarray
    parameter: int
    key: str = "exp_avg_sq"


@dataclass(frozen=True)
class Oracle:
    """A rule's formula, and one case for each moment."""

    exp_avg: Rule
    exp_avg_sq: Rule
    formula: Callable[[Any, Elements], np.ndarray]


ORACLES: dict[type[Rule], Oracle] = {}

Formula = Callable[[Any, Elements], np.ndarray]


def oracle(exp_avg: Rule, exp_avg_sq: Rule) -> Callable[[Formula], Formula]:
    """Registers a formula for the class of `exp_avg_sq`."""

    def register(formula: Formula) -> Formula:
        ORACLES[type(exp_avg_sq)] = Oracle(exp_avg, exp_avg_sq, formula)
        return formula

    return register


@oracle(Keep(), Keep())
def keep(rule: Keep, e: Elements) -> np.ndarray:
    return e.x


@oracle(Scale(0.3), Scale(0.09))
def scale(rule: Scale, e: Elements) -> np.ndarray:
    return rule.factor * e.x


@oracle(Fill(0.0), Fill(1.7))
def fill(rule: Fill, e: Elements) -> np.ndarray:
    return np.full_like(e.x, rule.value)


@oracle(Floor(0.1, 0.7), Floor(0.25, 1.1))
def floor(rule: Floor, e: Elements) -> np.ndarray:
    return np.maximum(rule.factor * e.x, rule.minimum)


@oracle(PruneMagnitude(0.4), PruneMagnitude(0.6))
def prune_magnitude(rule: PruneMagnitude, e: Elements) -> np.ndarray:
    return np.where(np.abs(e.x) > np.float32(rule.threshold), e.x, 0.0)


@oracle(PruneRandom(0.9, 3), PruneRandom(0.9, 3))
def prune_random(rule: PruneRandom, e: Elements) -> np.ndarray:
    key = stream_key(rule.seed, e.parameter)
    gone = [Fraction(splitmix64(key, int(i)) >> 11, 1 << 53) < rule.probability for i in e.index]
    return np.where(gone, 0.0, e.x)


@oracle(Keep(), BatchSize(4.0, BETAS, STEP))
def batch_size(rule: BatchSize, e: Elements) -> np.ndarray:
    (b1, b2), step = rule.betas, rule.step
    m_hat, v_hat = e.exp_avg / (1 - b1**step), e.x / (1 - b2**step)
    c = (1 - b1) / (1 + b1)
    g2 = np.clip((m_hat**2 - c * v_hat) / (1 - c), 0.0, v_hat)
    return (g2 + (v_hat - g2) / rule.ratio) * (1 - b2**step)


@oracle(Keep(), BatchRatio(0.25))
def batch_ratio(rule: BatchRatio, e: Elements) -> np.ndarray:
    return batch_size(BatchSize(rule.ratio, BETAS, STEP), e)


@oracle(BiasConsistent(), BiasConsistent())
def bias_consistent(rule: BiasConsistent, e: Elements) -> np.ndarray:
    which = ("exp_avg", "exp_avg_sq").index(e.key)
    return e.x / (1 - BETAS[which] ** STEP) * (1 - NEXT_BETAS[which] ** NEXT_STEP)


@oracle(Prune(0.6), Prune(0.6))
def prune(rule: Prune, e: Elements) -> np.ndarray:
    threshold = np.quantile(np.abs(e.x), rule.fraction, method="lower")
    return np.where(np.abs(e.x) > threshold, e.x, 0.0)


@oracle(FillFrom("mean"), FillFrom("median"))
def fill_from(rule: FillFrom, e: Elements) -> np.ndarray:
    found = {"mean": np.mean, "median": lambda x: np.quantile(x, 0.5, method="lower")}
    return np.full_like(e.x, found[rule.statistic](e.x))


@oracle(MeanOf("w"), MeanOf("w*"))
def mean_of(rule: MeanOf, e: Elements) -> np.ndarray:
    """Of a pattern that matches one parameter whose elements are these."""
    return np.full_like(e.x, np.mean(e.x))


@oracle(Clip(0.4), Clip(0.6))
def clip(rule: Clip, e: Elements) -> np.ndarray:
    return np.sign(e.x) * np.minimum(np.abs(e.x), rule.limit)


def splitmix64(key: int, index: int) -> int:
    """Output `index` of the stream at `key`, in Python's own integers."""
    mask = (1 << 64) - 1
    z = (key + (index + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def stream_key(seed: int, parameter: int) -> int:
    """The key of a seed and a parameter, as PruneRandom documents it."""
    mask = (1 << 64) - 1
    return splitmix64(splitmix64(seed & mask, 0) ^ (parameter & mask), 0)
