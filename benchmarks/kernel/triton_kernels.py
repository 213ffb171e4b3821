"""The same rules as Triton kernels, one launch a tensor; imported only where there is Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from megatron_ext._ops.segments import STATISTICS_COLUMNS, Statistics, encode

from .operations import BATCH_SIZE, RESET, Operation, State, segments
from .peers import Step

_BLOCK = 2048
_RULES = {RESET: 1, BATCH_SIZE: 2}


@triton.jit
def _tally(out, old, new, inside, STATISTICS: tl.constexpr):
    """Five columns of one moment over one block."""
    magnitude = tl.abs(new)
    wide = tl.where(inside, new, 0.0).to(tl.float64)
    tl.store(out + 1, tl.sum(wide * wide))
    tl.store(out + 2, tl.max(tl.where(inside & (new == new), magnitude, 0.0)).to(tl.float64))
    bad = inside & ~(magnitude <= 3.4028234663852886e38)
    tl.store(out + 3, tl.sum(bad.to(tl.int32)).to(tl.float64))
    if STATISTICS == 2:
        wide = tl.where(inside, old, 0.0).to(tl.float64)
        tl.store(out, tl.sum(wide * wide))
        changed = inside & (old != new) & ~((old != old) & (new != new))
        tl.store(out + 4, tl.sum(changed.to(tl.int32)).to(tl.float64))


@triton.jit
def _transform(
    m, v, n, c, partials, RULE: tl.constexpr, STATISTICS: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    old_m = tl.zeros([BLOCK], tl.float32)
    old_v = tl.zeros([BLOCK], tl.float32)
    if RULE != 1:
        old_m = tl.load(m + at, inside, other=0.0)
        old_v = tl.load(v + at, inside, other=0.0)
    new_m = old_m
    if RULE == 0:
        new_m = old_m * tl.load(c)
        new_v = old_v * tl.load(c + 6)
    elif RULE == 1:
        new_v = old_v
    else:
        m_hat = old_m * tl.load(c + 6)
        v_hat = old_v * tl.load(c + 7)
        g2 = (m_hat * m_hat - v_hat * tl.load(c + 8)) * tl.load(c + 9)
        g2 = tl.where(g2 < 0.0, 0.0, g2)
        g2 = tl.where(g2 > v_hat, v_hat, g2)
        new_v = (g2 + (v_hat - g2) * tl.load(c + 10)) * tl.load(c + 11)
    if RULE != 2:
        tl.store(m + at, new_m, inside)
    tl.store(v + at, new_v, inside)
    if STATISTICS != 0:
        _tally(partials + block * 10, old_m, new_m, inside, STATISTICS)
        _tally(partials + block * 10 + 5, old_v, new_v, inside, STATISTICS)


def build(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    """As `.peers.Build`."""
    assert operation.rules is not None
    pairs = list(zip(state.exp_avg, state.exp_avg_sq, strict=True))
    device = state.exp_avg[0].device
    rows = [encode(segments([1], operation.rules(factor)))[1][0] for factor in factors]
    tables = [row.float().to(device) for row in rows]
    rule, statistics = _RULES.get(operation.kind, 0), int(operation.statistics)

    def step(call: int) -> dict[str, list[torch.Tensor]] | None:
        table = tables[call % len(tables)]
        found = []
        for m, v in pairs:
            blocks = triton.cdiv(m.numel(), _BLOCK)
            partials = m.new_empty((blocks, 2, 5) if statistics else 0, dtype=torch.float64)
            _transform[(blocks,)](m, v, m.numel(), table, partials, rule, statistics, _BLOCK)
            if statistics:
                found.append((partials.sum(0), partials[..., 2].amax(0)))
        return _columns(found, statistics) if statistics else None

    return step


def _columns(
    found: list[tuple[torch.Tensor, torch.Tensor]], statistics: int
) -> dict[str, list[torch.Tensor]]:
    out = {}
    for i, name in enumerate(STATISTICS_COLUMNS):
        if statistics == Statistics.AFTER and name in ("square_sum_before", "changed"):
            continue
        per_tensor = [largest if i == 2 else sums[:, i] for sums, largest in found]
        out[name] = [x[moment] for moment in range(2) for x in per_tensor]
    return out
