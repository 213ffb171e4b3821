"""The implementations that are there only sometimes: torch.compile, Triton, TE or apex."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from megatron_ext._ops import reference
from megatron_ext._ops.segments import STATISTICS_COLUMNS, Statistics, encode

from .operations import BATCH_SIZE, RESCALE, RESET, Operation, State, segments
from .peers import Build, Peer, Step

COMPILED, TRITON, MULTI_TENSOR = "torch.compile", "Triton", "multi_tensor (TE or apex)"
#: In the order in which megatron.core.optimizer.clip_grads looks for them: the module of the
#: applier, the module of the kernels.
_MULTI_TENSOR = (
    ("transformer_engine.pytorch.optimizers", "transformer_engine.pytorch.optimizers"),
    ("apex.multi_tensor_apply", "amp_C"),
)


def optional_peers(operation: Operation, device: str, compiled: bool) -> list[Peer]:
    """Those that can be measured here."""
    if operation.rules is None:
        return []
    there = absent(device, compiled)
    out = []
    if COMPILED not in there:
        note = "one graph, called for each tensor; bytes if it is fused completely"
        out.append(Peer(COMPILED, _compiled, operation.traffic, note=note))
    if TRITON not in there:
        from .triton_kernels import build

        out.append(Peer(TRITON, build, operation.traffic, note="one launch a tensor"))
    if MULTI_TENSOR not in there and operation.kind == RESCALE:
        out.append(_multi_tensor_peer(operation.statistics))
    return out


def absent(device: str, compiled: bool) -> dict[str, str]:
    """Which of them cannot be measured here, and why."""
    out = {}
    if not compiled:
        out[COMPILED] = "not asked for (--compile)"
    if device != "cuda":
        out[TRITON] = out[MULTI_TENSOR] = "CUDA only"
        return out
    if importlib.util.find_spec("triton") is None:
        out[TRITON] = "not present"
    if _multi_tensor_modules() is None:
        out[MULTI_TENSOR] = "not present"
    return out


def _formula(
    operation: Operation, m: torch.Tensor, v: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    if operation.kind == RESCALE:
        return m * c[0], v * c[6]
    if operation.kind == RESET:
        return torch.zeros_like(m), torch.zeros_like(v)
    return m, reference._batch_size(m, v, c[6:])  # type: ignore[arg-type]


def _tally(old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, ...]:
    magnitude = new.abs()
    return (
        old.double().square().sum(),
        new.double().square().sum(),
        torch.where(magnitude.isnan(), 0.0, magnitude).max(),
        (~new.isfinite()).sum(),
        ((old != new) & ~(old.isnan() & new.isnan())).sum(),
    )


def _compiled(state: State, operation: Operation, factors: Sequence[float]) -> Step:
    assert operation.rules is not None
    statistics, rules = operation.statistics, operation.rules
    skipped = (0, 4) if statistics == Statistics.AFTER else ()

    def one(m: torch.Tensor, v: torch.Tensor, c: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        new_m, new_v = _formula(operation, m, v, c)
        counted = []
        if statistics:
            for tally in (_tally(m, new_m), _tally(v, new_v)):
                counted.append(tuple(x for i, x in enumerate(tally) if i not in skipped))
        if operation.kind != BATCH_SIZE:
            m.copy_(new_m)
        v.copy_(new_v)
        return counted

    # Without dynamic shapes every size would be compiled by itself.
    compiled = torch.compile(one, dynamic=True, fullgraph=True)
    pairs = list(zip(state.exp_avg, state.exp_avg_sq, strict=True))
    device = state.exp_avg[0].device
    rows = [encode(segments([1], rules(factor)))[1][0] for factor in factors]
    tables = [row.float().to(device) for row in rows]
    names = [name for i, name in enumerate(STATISTICS_COLUMNS) if i not in skipped]

    def step(call: int) -> dict[str, list[torch.Tensor]] | None:
        table = tables[call % len(tables)]
        found = [compiled(m, v, table) for m, v in pairs]
        if not statistics:
            return None
        return {
            name: [tensor[moment][i] for moment in range(2) for tensor in found]
            for i, name in enumerate(names)
        }

    return step


def _multi_tensor_modules() -> tuple[Any, Any] | None:
    for applier, kernels in _MULTI_TENSOR:
        try:
            return importlib.import_module(applier), importlib.import_module(kernels)
        except (ImportError, OSError):
            continue
    return None


def _multi_tensor_peer(statistics: Statistics) -> Peer:
    scale = (("scale", 16),)
    if statistics == Statistics.NONE:
        return Peer(MULTI_TENSOR, _multi_tensor(False, False), scale)
    before = statistics == Statistics.BEFORE_AND_AFTER
    norms = (("norms before", 8),) * before + (("norms after", 8),)
    note = "no largest, no counts"
    return Peer(MULTI_TENSOR, _multi_tensor(before, True), scale + norms, note=note)


def _multi_tensor(before: bool, after: bool) -> Build:
    def build(state: State, operation: Operation, factors: Sequence[float]) -> Step:
        modules = _multi_tensor_modules()
        assert modules is not None
        apply, kernels = modules[0].multi_tensor_applier, modules[1]
        overflow = torch.zeros(1, dtype=torch.int, device=state.exp_avg[0].device)
        both = state.both

        def norms() -> list[torch.Tensor]:
            found = apply(kernels.multi_tensor_l2norm, overflow, [both], True)
            return list(found[1].unbind())

        def step(call: int) -> dict[str, list[torch.Tensor]] | None:
            factor = factors[call % len(factors)]
            out = {}
            if before:
                out["norm_before"] = norms()
            for x, by in ((state.exp_avg, factor), (state.exp_avg_sq, factor * factor)):
                apply(kernels.multi_tensor_scale, overflow, [x, x], by)
            if after:
                out["norm_after"] = norms()
            return out or None

        return step

    return build
