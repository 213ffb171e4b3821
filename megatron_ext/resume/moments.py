"""Change the moments of this rank's shards with the fused op, and count the changes."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import _ops
from .._ops import native
from .._ops.quantiles import Part
from .._ops.segments import Segment, Statistics
from ..base.log import say
from ..base.placement import Run
from ..errors import PlanError
from ..host.optimizers import state_of
from ..rules.elementwise import KEEP
from ..rules.form import MOMENTS
from .scaled import OpenMoment, is_scaled, open_moment, rules_of
from .shard_rules import FillColumns, MomentShard
from .statistics import columns

#: Bytes of the fp32 copies of scaled moments that are there at the same time, but for a parameter
#: that needs more by itself. Small moments are chosen to save memory, and all copies together would
#: need more than that saves.
COPIES = 1 << 26
_COLUMNS_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class MomentStatistics:
    """Statistics of one moment of one parameter shard, over all its elements.

    Args:
        norm_before: Euclidean norm before; None if only the new values were counted.
        norm_after: Euclidean norm after.
        largest: Largest absolute value after, ignoring NaN.
        nonfinite: Number of NaN and infinite values after, and of negative ones of a second moment.
        changed: Number of elements whose value differs; None if only the new values were counted.
    """

    norm_before: float | None
    norm_after: float
    largest: float
    nonfinite: int
    changed: int | None


def parameter_number(name: str) -> int:
    """Hash a parameter's name to 64 bits for random rules, equally on every rank and layout."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@torch.no_grad()
def transform(
    shards: Sequence[MomentShard], statistics: Statistics = Statistics.NONE
) -> list[dict[str, MomentStatistics]]:
    """Apply rules to the moments in place; master weights are not touched.

    One call of ``megatron_ext::transform_moments_`` changes all shards on a device. TE's fp16 and
    fp8 moments have a scale per tensor: a rescale of the whole tensor only changes the scale. Other
    rules use TE's ``get_unscaled_state`` and ``set_scaled_state``
    (transformer_engine/pytorch/optimizers/fused_adam.py). A parameter with one moment has a call of
    its own, because the op takes pairs.

    Args:
        shards: Parameters with state. Shards without rules are not changed.
        statistics: The statistics to count.

    Returns:
        The statistics of each shard by state key; empty dicts for `Statistics.NONE`.

    Raises:
        PlanError: A parameter has no moments.
        RuntimeError: Ranges overlap or lie outside the shard (`megatron_ext._ops.schema`). No
            moment has been written.
    """
    batches = _batches(shards)
    if len(batches) > 1:  # what one batch finds out, before the first one writes
        for shard in shards:
            _require_ranges(shard)
    return [found for batch in batches for found in _transform(batch, statistics)]


def _batches(shards: Sequence[MomentShard]) -> list[list[MomentShard]]:
    """Cut shards into batches by the size of the fp32 copies that their scaled moments need."""
    out: list[list[MomentShard]] = [[]]
    size = 0
    for shard in shards:
        keys = state_of(shard.inner).tensors
        state = shard.inner.state.get(shard.param, {})
        mine = sum(4 * state[k].numel() for k in keys if k in state and is_scaled(shard.inner, k))
        if out[-1] and mine and size + mine > COPIES:
            out.append([])
            size = 0
        out[-1].append(shard)
        size += mine
    return out


def _require_ranges(shard: MomentShard) -> None:
    _opened(shard)
    numel = shard.inner.state[shard.param][state_of(shard.inner).tensors[0]].numel()
    at = 0
    for rule in sorted(shard.rules, key=lambda r: (r.begin, r.end)):
        if not (at <= rule.begin <= rule.end <= numel):
            raise RuntimeError(
                f"{shard.name}: elements {rule.begin} to {rule.end} have two rules or are not "
                f"within the shard's {numel}"
            )
        at = rule.end


def _opened(shard: MomentShard) -> tuple[OpenMoment, OpenMoment | None]:
    first, second = open_moment(shard, 0), open_moment(shard, 1)
    if first is None:
        raise PlanError(f"{shard.name} has no moments: {state_of(shard.inner)}")
    return first, second


def _transform(
    shards: Sequence[MomentShard], statistics: Statistics
) -> list[dict[str, MomentStatistics]]:
    moments = [_opened(s) for s in shards]
    counts: list[torch.Tensor | None] = [None] * len(shards)
    together: dict[tuple[torch.device, int | None], list[int]] = {}
    for i, (first, second) in enumerate(moments):
        if statistics or not first.only_scale or (second is not None and not second.only_scale):
            alone = i if second is None else None
            together.setdefault((first.tensor().device, alone), []).append(i)
    calls = []
    unused = _Unused()
    for (device, _), members in together.items():
        announce(device.type)
        exp_avg, exp_avg_sq = zip(*(_tensors(*moments[i], unused) for i in members), strict=True)
        segments = [
            segment
            for tensor, i in enumerate(members)
            for segment in _segments(tensor, shards[i], exp_avg[tensor].numel(), statistics)
        ]
        calls.append((members, _ops.Transform.of(exp_avg, exp_avg_sq, segments)))
    fills = [_column_fills(shard, pair) for shard, pair in zip(shards, moments, strict=True)]
    if len(calls) > 1 or any(fills):
        # The ranges of all devices are checked before the first write.
        calls = [(members, call.prepare()) for members, call in calls]
    for fill in (f for of_shard in fills for f in of_shard):
        fill()
    for members, call in calls:
        for i, row in zip(members, call(statistics).cpu(), strict=False):
            counts[i] = row
    for moment in (m for pair in moments for m in pair if m is not None):
        moment.close()
    return [_statistics(s, row) for s, row in zip(shards, counts, strict=True)]


class _Unused:
    """Zeros in the place of a second moment, for the op. It keeps them, so that all calls share."""

    def __init__(self) -> None:
        self._zeros: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """Return zeros of the length, dtype and device of a tensor."""
        held = self._zeros.get((x.device, x.dtype))
        if held is None or held.numel() < x.numel():
            held = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
            self._zeros[x.device, x.dtype] = held
        return held[: x.numel()].view(x.shape)


def _tensors(
    first: OpenMoment, second: OpenMoment | None, unused: _Unused
) -> tuple[torch.Tensor, torch.Tensor]:
    x = first.tensor()
    return x, unused.like(x) if second is None else second.tensor()


def magnitude_thresholds(
    shards: Sequence[MomentShard],
    key: str,
    groups: Sequence[int],
    quantiles: Sequence[float],
    reduce: Callable[[torch.Tensor], object] | None = None,
) -> list[float]:
    """Compute the p-quantile of abs(exp_avg) or abs(exp_avg_sq) for groups of whole parameters.

    Args:
        shards: This rank's parameters, on one device.
        key: ``exp_avg`` or ``exp_avg_sq``.
        groups: The group number of each shard.
        quantiles: p of each group, in [0, 1].
        reduce: Sums a histogram in place over the ranks that hold the groups' other shards. It is
            called three times (see `megatron_ext._ops.magnitude_thresholds`). None for one rank.
    """
    which = MOMENTS.index(key)
    device = shards[0].param.device if shards else torch.device("cpu")

    def parts() -> Iterator[Part]:
        for shard, group in zip(shards, groups, strict=True):
            if (moment := open_moment(shard, which)) is not None:
                values = moment.tensor()
                yield values, [(0, values.numel(), group)]

    out = _ops.magnitude_thresholds_of(
        parts, torch.tensor(quantiles, dtype=torch.float64), device, reduce
    )
    return [float(x) for x in out.tolist()]


def _segments(tensor: int, shard: MomentShard, numel: int, statistics: Statistics) -> list[Segment]:
    number = parameter_number(shard.name)
    out = [
        Segment(tensor, r.begin, r.end, _of_op(r.exp_avg), _of_op(r.exp_avg_sq), r.index, number)
        for r in shard.rules
    ]
    if statistics:
        # The statistics include elements without a rule.
        at = 0
        for rule in sorted(shard.rules, key=lambda r: r.begin):
            if at < rule.begin:
                out.append(Segment(tensor, at, rule.begin))
            at = max(at, rule.end)
        if at < numel:
            out.append(Segment(tensor, at, numel))
    return out


def _of_op(rule: Any) -> Any:
    """Return the rule for the fused op. Column fills are applied beforehand and become keep."""
    return KEEP if isinstance(rule, FillColumns) else rule


def _column_fills(
    shard: MomentShard, pair: tuple[OpenMoment | None, OpenMoment | None]
) -> list[Callable[[], torch.Tensor]]:
    out: list[Callable[[], torch.Tensor]] = []
    for which, moment in enumerate(pair):
        for r, rule in zip(shard.rules, rules_of(shard, which), strict=True):
            if isinstance(rule, FillColumns) and moment is not None:
                run = Run(r.begin, r.end, r.index)
                out.append(functools.partial(_fill_columns, moment, run, rule.values))
    return out


def _fill_columns(moment: OpenMoment, run: Run, values: torch.Tensor) -> torch.Tensor:
    target = moment.tensor().view(-1)[run.begin : run.end]
    values = values.to(target.device, torch.float32)
    for begin in range(0, run.end - run.begin, _COLUMNS_AT_A_TIME):
        end = min(begin + _COLUMNS_AT_A_TIME, run.end - run.begin)
        column = columns(run, begin, end, len(values), target.device)
        target[begin:end] = values[column].to(target.dtype)
    return target


def _statistics(shard: MomentShard, row: torch.Tensor | None) -> dict[str, MomentStatistics]:
    if row is None:
        return {}
    out = {}
    state = state_of(shard.inner)
    for slot, (before, after, largest, nonfinite, changed) in zip(
        MOMENTS, row.tolist(), strict=True
    ):
        if (key := state.tensor(slot)) is None:
            continue
        counted = before != -1.0 or changed != -1.0
        out[key] = MomentStatistics(
            norm_before=math.sqrt(before) if counted else None,
            norm_after=math.sqrt(after),
            largest=largest,
            nonfinite=int(nonfinite),
            changed=int(changed) if counted else None,
        )
    return out


@functools.cache
def announce(device: str) -> None:
    """Log once which kernel is used on a device, and why."""
    if device in native.DEVICES:
        kernel = native.kernel(device)
        name = "compiled" if kernel.native else "reference"
        say(f"megatron_ext: moments on {device}: {name} kernel ({kernel.reason})")
