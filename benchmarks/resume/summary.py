"""Ratios of paired measurements with bootstrap intervals, and the targets."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cases import (
    KEEP,
    KEEP_COLD,
    RESCALE,
    RESET,
    RESET_COLD,
    RESET_V,
    STOCK,
    STOCK_COLD,
    VERIFIED,
    Case,
)

#: What a load consists of; ``transform`` is a part of ``load_state_dict``.
LOAD = ("sharded_state_dict", "read", "load_state_dict")
_RESAMPLES = 2000
#: A ratio of times counts as measured from so many repeats.
_REPEATS = 20

Samples = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Ratio:
    """A median ratio of paired measurements with its bootstrap 95% interval."""

    median: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        """As it stands in the tables."""
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Verdict:
    """One target.

    Args:
        figure: What it is about.
        found: Measured.
        target: What it has to be; empty for a figure that is only shown.
        verdict: ``met``, ``missed``, ``not run`` and why; ``-`` without a target.
    """

    figure: str
    found: str
    target: str
    verdict: str


def load_seconds(sample: Mapping[str, Any]) -> float:
    """From the sharded state dict to the loaded optimizer."""
    return sum(sample["seconds"].get(part, 0.0) for part in LOAD)


def load_peak(sample: Mapping[str, Any]) -> float:
    """Largest memory above what was held before the optimizer was built: device, else host."""
    kind = "device_peak" if sample["device_peak"] else "peak"
    return float(max(sample[kind].get(part, 0) for part in LOAD))


def of(samples: Samples, variant: str) -> list[Mapping[str, Any]]:
    """The samples of a variant, by repeat."""
    found = [s for s in samples if s["variant"] == variant]
    return sorted(found, key=lambda s: s["repeat"])


def ratio(
    samples: Samples, one: str, other: str, value: Callable[[Mapping[str, Any]], float]
) -> Ratio:
    """The median of one variant's value divided by another's, over the repeats that have both."""
    others = {s["repeat"]: s for s in of(samples, other)}
    pairs = [(s, others[s["repeat"]]) for s in of(samples, one) if s["repeat"] in others]
    ratios = [value(a) / value(b) for a, b in pairs]
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(_RESAMPLES)
    )
    low, high = medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES)]
    return Ratio(statistics.median(ratios), low, high, len(ratios))


def median(samples: Samples, variant: str, value: Callable[[Mapping[str, Any]], float]) -> float:
    """Over the repeats."""
    return statistics.median(map(value, of(samples, variant)))


def verdicts(case: Case, result: Mapping[str, Any], device: str) -> Iterator[Verdict]:
    """Every target that a series can answer."""
    samples, stock_bytes = result["samples"], case.bytes_per_parameter
    at_most = 1.02 if device == "cuda" else 1.10
    yield _time(case, samples, "keep / stock, load", KEEP, STOCK, 1.01)
    yield _peak(case, result["memory"])
    yield _time(case, samples, "rescale / keep, load", RESCALE, KEEP, at_most)
    for name, left in ((RESET, stock_bytes - 8), (RESET_V, stock_bytes - 4)):
        yield _payload(case, samples, name, left)
    if case.format != "torch":
        yield _stored(case, result)
        if any(of(samples, VERIFIED)):  # results before this variant have none
            verified = ratio(samples, VERIFIED, KEEP, load_seconds)
            yield Verdict(f"{case}: {VERIFIED} / keep, load", str(verified), "", "-")
    cold = ratio(samples, KEEP_COLD, STOCK_COLD, load_seconds)
    yield Verdict(f"{case}: keep / stock, load from a cold cache", str(cold), "", "-")
    cold = ratio(samples, RESET_COLD, STOCK_COLD, load_seconds)
    yield Verdict(f"{case}: reset / stock, load from a cold cache", str(cold), "aim 0.6", "-")
    step = ratio(samples, KEEP, STOCK, lambda s: s["seconds"]["first step"])
    yield Verdict(f"{case}: keep / stock, first step", str(step), "", "-")
    same = result["step"][KEEP] == result["step"][STOCK]
    yield Verdict(
        f"{case}: the step's function and collectives",
        "stock's" if same else f"{result['step'][KEEP]}, stock {result['step'][STOCK]}",
        "stock's",
        "met" if same else "missed",
    )


def _time(case: Case, samples: Samples, what: str, one: str, other: str, at_most: float) -> Verdict:
    found = ratio(samples, one, other, load_seconds)
    verdict = "met" if found.low <= at_most else "missed"
    if found.pairs < _REPEATS:
        verdict = f"not run ({found.pairs} repeats, not {_REPEATS})"
    return Verdict(f"{case}: {what}", str(found), f"<= {at_most:.2f}", verdict)


def _peak(case: Case, samples: Samples) -> Verdict:
    found = ratio(samples, KEEP, STOCK, load_peak)
    verdict = "met" if found.low <= 1.0 else "missed"
    if found.pairs < _REPEATS:
        verdict = f"not run ({found.pairs} repeats, not {_REPEATS})"
    return Verdict(f"{case}: keep / stock, peak memory of the load", str(found), "<= 1.00", verdict)


def _payload(case: Case, samples: Samples, name: str, left: int) -> Verdict:
    ours = median(samples, name, lambda s: s["payload"])
    stock = median(samples, STOCK, lambda s: s["payload"])
    what = f"{case}: {name} / stock, bytes of the tensors read"
    if case.format == "torch":
        return Verdict(what, f"{ours / stock:.4f}", "", "- (one file, read as a whole)")
    total = case.bytes_per_parameter
    exact = ours * total == stock * left
    return Verdict(
        what, f"{ours / stock * total:.6g}/{total}", f"{left}/{total}", "met" if exact else "missed"
    )


def _stored(case: Case, result: Mapping[str, Any]) -> Verdict:
    """Bytes of the files against those of the tensors, of a full reset."""
    samples = result["samples"]
    stored, payload = (median(samples, RESET, lambda s, k=k: s[k]) for k in ("stored", "payload"))
    excess = stored / payload - 1.0
    large = result["parameters"] >= 95e6
    return Verdict(
        f"{case}: reset, bytes from storage above those of the tensors",
        f"{excess:.2%}",
        "<= 1% from 100M",
        "-" if not large else "met" if excess <= 0.01 else "missed",
    )
