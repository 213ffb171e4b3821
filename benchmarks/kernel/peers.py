"""The implementations that are compared: this package, plain torch, and the device's limits.

Each is built for a state, an operation and the factors of its successive calls, and is then called
with the number of the call. What it counted comes back as it falls out, without a synchronization;
`columns` puts it in order, outside of what is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor, inf
from typing import Any

import torch

from megatron_ext._ops import Transform, magnitude_thresholds
from megatron_ext._ops.segments import STATISTICS_COLUMNS, Statistics

from .operations import (
    BATCH_SIZE,
    CHECKED,
    COMPARE,
    QUANTILE,
    RESCALE,
    RESET,
    THRESHOLDS,
    Operation,
    State,
    coefficients,
    segments,
)

#: What a call returns: None, the op's own result, columns by name (exp_avg's tensors, then
#: exp_avg_sq's), or the threshold.
Step = Callable[[int], Any]
Build = Callable[[State, Operation, Sequence[float]], Step]
#: Bytes in fp32 by name, for one element of exp_avg and one of exp_avg_sq (`Operation.traffic`).
Traffic = tuple[tuple[str, int], ...]

OURS, UNPREPARED = "ours", "ours, unprepared"
FOREACH, SHORTCUT = "foreach", "foreach, shortcut"
COPY, MUL, ZERO = "limit: copy_", "limit: mul_", "limit: zero_"


@dataclass(frozen=True)
class Peer:
    """One implementation of one operation.

    Args:
        name: For the report.
        build: Makes the call.
        traffic: None where the time does not follow from the bytes.
        limit: Whether it does something else that is as good as the device gets.
        note: What it leaves out.
    """

    name: str
    build: Build
    traffic: Traffic | None
    limit: bool = False
    note: str = ""


def peers(operation: Operation, device: str, dtype: str) -> list[Peer]:
    """Ours, those that need torch only, and the limits.

    In 16 bits torch's norms are no statistics, so that only the limits are left beside ours there.
    """
    found = _peers(operation, device)
    if dtype == "float32" or operation.statistics == Statistics.NONE:
        return found
    return [p for p in found if p.limit or p.name in (OURS, UNPREPARED)]


def _peers(operation: Operation, device: str) -> list[Peer]:
    ours = [Peer(OURS, _ours, operation.traffic)]
    if operation.kind == THRESHOLDS:
        # On the CPU a sort takes several times as long as kthvalue; on CUDA it is the other way.
        sort = [Peer("sort", _sort, None)] if device == "cuda" else []
        return [
            Peer(OURS, _ours_thresholds, operation.traffic),
            Peer("kthvalue", _kthvalue, None),
            Peer("quantile", _quantile, None),
            *sort,
        ]
    if operation.kind == COMPARE:
        passes: Traffic = (("to", 6), ("ne", 5), ("count_nonzero", 1))
        return [
            Peer(OURS, _ours_compared, operation.traffic),
            Peer("to, ne, count_nonzero", _compared, passes, note="no largest difference"),
            Peer(COPY, _copy_limit, (("copy_", 16),), limit=True),
        ]
    ours.append(Peer(UNPREPARED, _ours_unprepared, operation.traffic, note="table in every call"))
    return ours + {RESCALE: _rescale, RESET: _reset, BATCH_SIZE: _batch_size}[operation.kind](
        operation.statistics
    )


def columns(result: Any, tensors: int) -> dict[str, torch.Tensor]:
    """What a call counted: float64 ``[tensors, 2]`` by column; empty if it counts nothing."""
    if result is None or len(result) == 0:
        return {}
    if isinstance(result, torch.Tensor):
        return {name: result[..., i].double() for i, name in enumerate(STATISTICS_COLUMNS)}
    return {
        name: torch.stack([torch.as_tensor(x).double().cpu() for x in values]).reshape(2, tensors).T
        for name, values in result.items()
    }


def _transforms(state: State, operation: Operation, factors: Sequence[float]) -> list[Transform]:
    assert operation.rules is not None
    sizes = [len(x) for x in state.exp_avg]
    return [
        Transform.of(state.exp_avg, state.exp_avg_sq, segments(sizes, operation.rules(factor)))
        for factor in factors
    ]


def _ours(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    transforms = [t.prepare() for t in _transforms(state, operation, factors)]
    statistics = operation.statistics
    return lambda call: transforms[call % len(transforms)](statistics)


def _ours_unprepared(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    transforms = _transforms(state, operation, factors)
    statistics = operation.statistics
    return lambda call: transforms[call % len(transforms)](statistics)


def _rescale(statistics: Statistics) -> list[Peer]:
    mul: Traffic = (("mul_", 16),)
    limits = [
        Peer(COPY, _copy_limit, (("copy_", 16),), limit=True),
        Peer(MUL, _mul_limit, mul, limit=True),
    ]
    if statistics == Statistics.NONE:
        return [
            Peer("loop of mul_", _loop_mul, mul),
            Peer(FOREACH, _foreach_mul, mul),
            *limits,
        ]
    before: Traffic = (("norms before", 8),)
    norms: Traffic = (*mul, ("norms after", 8), ("largest", 8))
    if statistics == Statistics.BEFORE_AND_AFTER:
        norms = before + norms
    return [
        Peer(FOREACH, _foreach_rescale(False), norms + _NONFINITE, note="no changed count"),
        Peer(SHORTCUT, _foreach_rescale(True), norms, note=f"no changed count; {_SHORTCUT_NOTE}"),
        *limits,
    ]


#: isfinite(x) is (x == x) * (abs(x) != inf), 5 + 8 + 5 + 3 bytes, and the count reads 1 more.
_NONFINITE: Traffic = (("isfinite, count_nonzero", 44),)


_SHORTCUT_NOTE = "reads the largest back and looks for what is not finite only if one is not"


def _largest_and_nonfinite(both: list[torch.Tensor], shortcut: bool) -> dict[str, Any]:
    if shortcut and not both[0].is_cuda:
        # On the CPU the norm of order inf runs at a tenth of the speed of aminmax.
        ends = [torch.aminmax(x) for x in both]
        largest = [torch.maximum(e.max, -e.min) for e in ends]
    else:
        largest = list(torch._foreach_norm(both, inf))
    if shortcut and bool(torch.stack(largest).isfinite().all()):
        nonfinite = [torch.zeros(())] * len(both)
    else:
        nonfinite = [x.numel() - torch.isfinite(x).count_nonzero() for x in both]
    return {"largest": largest, "nonfinite": nonfinite}


def _loop_mul(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    def step(call: int) -> None:
        factor = factors[call % len(factors)]
        for x in state.exp_avg:
            x.mul_(factor)
        for x in state.exp_avg_sq:
            x.mul_(factor * factor)

    return step


def _foreach_mul(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    def step(call: int) -> None:
        factor = factors[call % len(factors)]
        torch._foreach_mul_(state.exp_avg, factor)
        torch._foreach_mul_(state.exp_avg_sq, factor * factor)

    return step


def _foreach_rescale(shortcut: bool) -> Build:
    def build(state: State, operation: Operation, factors: Sequence[float]) -> Step:
        mul = _foreach_mul(state, operation, factors)
        both = state.both
        before = operation.statistics == Statistics.BEFORE_AND_AFTER

        def step(call: int) -> dict[str, Sequence[torch.Tensor]]:
            out: dict[str, Sequence[torch.Tensor]] = {}
            if before:
                out["norm_before"] = torch._foreach_norm(both)
            mul(call)
            out["norm_after"] = torch._foreach_norm(both)
            return out | _largest_and_nonfinite(both, shortcut)

        return step

    return build


def _batch_size(statistics: Statistics) -> list[Peer]:
    limit = Peer(COPY, _copy_limit, (("copy_", 16),), limit=True)
    rule: Traffic = (("mul", 8), ("addcmul_", 12), ("clamp_min_", 8), ("minimum_", 12))
    rule += (("lerp_", 12),)
    if statistics == Statistics.NONE:
        return [Peer(FOREACH, _foreach_batch_size, rule), limit]
    norms: Traffic = (("copy_", 8), ("norms of m, v before, v after", 12), ("largest", 8))
    changed: Traffic = (("ne, count_nonzero", 10),)
    full = rule + norms + changed
    return [
        Peer(FOREACH, _foreach_batch_size_statistics(False), full + _NONFINITE),
        Peer(SHORTCUT, _foreach_batch_size_statistics(True), full, note=_SHORTCUT_NOTE),
        limit,
    ]


def _folded(operation: Operation, factors: Sequence[float]) -> list[tuple[float, float, float]]:
    r"""Coefficients of the rule in the fewest passes.

    With everything in units of v, :math:`G = \operatorname{clip}(A m^2 - B v, 0, v)` and
    :math:`v' = G + (v - G) / k`.

    Returns:
        A, B and 1/k for each factor.
    """
    assert operation.rules is not None
    out = []
    for factor in factors:
        c_m, _, c, one_minus_c, one_over_k, correction = coefficients(operation.rules(factor))
        out.append((c_m * c_m * one_minus_c * correction, c * one_minus_c, one_over_k))
    return out


def _signal(m: list[torch.Tensor], v: list[torch.Tensor], a: float, b: float) -> list[torch.Tensor]:
    g = torch._foreach_mul(v, -b)
    torch._foreach_addcmul_(g, m, m, a)
    torch._foreach_clamp_min_(g, 0.0)
    torch._foreach_minimum_(g, v)
    return list(g)


def _foreach_batch_size(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    folded = _folded(operation, factors)
    m, v = state.exp_avg, state.exp_avg_sq

    def step(call: int) -> None:
        a, b, one_over_k = folded[call % len(folded)]
        torch._foreach_lerp_(v, _signal(m, v, a, b), 1.0 - one_over_k)

    return step


def _foreach_batch_size_statistics(shortcut: bool) -> Build:
    def build(state: State, operation: Operation, factors: Sequence[float]) -> Step:
        folded = _folded(operation, factors)
        m, v, both = state.exp_avg, state.exp_avg_sq, state.both
        unchanged = [torch.zeros((), device=m[0].device)] * len(m)

        def step(call: int) -> dict[str, Sequence[torch.Tensor]]:
            a, b, one_over_k = folded[call % len(folded)]
            new = _signal(m, v, a, b)
            torch._foreach_lerp_(new, v, one_over_k)
            norms = list(torch._foreach_norm(m))
            changed = [torch.ne(x, y).count_nonzero() for x, y in zip(new, v, strict=True)]
            out: dict[str, Sequence[torch.Tensor]] = {
                "norm_before": norms + list(torch._foreach_norm(v)),
                "norm_after": norms + list(torch._foreach_norm(new)),
                "changed": unchanged + changed,
            }
            torch._foreach_copy_(v, new)
            return out | _largest_and_nonfinite(both, shortcut)

        return step

    return build


def _reset(statistics: Statistics) -> list[Peer]:
    zero: Traffic = (("zero_", 8),)
    return [
        Peer("loop of zero_", _loop_zero, zero),
        Peer(FOREACH, _foreach_zero, zero),
        Peer(ZERO, _zero_limit, zero, limit=True),
    ]


def _loop_zero(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    both = state.both

    def step(_: int) -> None:
        for x in both:
            x.zero_()

    return step


def _foreach_zero(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    both = state.both

    def step(_: int) -> None:
        torch._foreach_zero_(both)

    return step


def _copy_limit(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    a, b = state.scratch

    def step(_: int) -> None:
        b.copy_(a)
        a.copy_(b)

    return step


def _mul_limit(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    a, b = state.scratch

    def step(call: int) -> None:
        a.mul_(factors[call % len(factors)])
        b.mul_(factors[call % len(factors)])

    return step


def _zero_limit(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    a, b = state.scratch

    def step(_: int) -> None:
        a.zero_()
        b.zero_()

    return step


def _ours_thresholds(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    ranges = torch.tensor([[i, 0, len(x), 0] for i, x in enumerate(state.exp_avg)])
    quantiles = torch.tensor([QUANTILE], dtype=torch.float64)
    return lambda _: magnitude_thresholds(state.exp_avg, ranges, quantiles)


def weights_of(master: Sequence[torch.Tensor], factors: Sequence[float]) -> list[torch.Tensor]:
    """The bf16 weights of some master weights; in a check one in 97 is another."""
    weights = [x.bfloat16() for x in master]
    if factors == CHECKED:
        for x in weights:
            x[::97] += 1.0
    return weights


def _ours_compared(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    weights = weights_of(state.exp_avg, factors)
    return lambda _: torch.ops.megatron_ext.compare_weights(state.exp_avg, weights)[:, 0]


def _compared(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    pairs = list(zip(state.exp_avg, weights_of(state.exp_avg, factors), strict=True))
    return lambda _: torch.stack([(m.bfloat16() != w).count_nonzero() for m, w in pairs])


def _kthvalue(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    (x,) = state.exp_avg
    k = floor(QUANTILE * (len(x) - 1)) + 1
    return lambda _: x.abs().kthvalue(k).values


def _sort(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    (x,) = state.exp_avg
    k = floor(QUANTILE * (len(x) - 1))
    return lambda _: x.abs().sort().values[k]


def _quantile(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    (x,) = state.exp_avg
    return lambda _: x.abs().quantile(QUANTILE, interpolation="lower")
