"""The optimizer tensors on this rank: counting what a resume has brought back, and changing them.

`LoadedState` counts every tensor that reaches an optimizer's own storage, so that a resume that
kept nothing cannot pass for one that kept the moments. `transform` applies rules to the moments,
in place, with one call of the fused op for all parameters of a device.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _ops, agree
from ._ops import Segment
from ._ops import Statistics as Statistics
from ._ops.segments import STATISTICS_COLUMNS
from .errors import CheckpointError, PlanError
from .layout import WHOLE, GlobalIndex, Run
from .log import say
from .row_statistics import columns
from .rules import KEEP, ElementRule

#: The tensors of Adam's state; `param` is Megatron's name for the fp32 master weight.
MOMENT_KEYS = ("exp_avg", "exp_avg_sq")

_COLUMNS_AT_A_TIME = 1 << 22
_SURVEYED = [STATISTICS_COLUMNS.index(name) for name in ("square_sum_after", "nonfinite")]


@dataclass
class LoadedState:
    """Counts of loaded tensors and elements, by state key.

    Args:
        tensors: State key -> number of shards written on this rank (after `summed`: on all).
        elements: State key -> number of elements in them.
        nonfinite: Elements of the moments that are NaN or infinite.
        keys: What has to arrive; of an optimizer that is not Adam all but ``param`` is ``state``.
    """

    tensors: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    nonfinite: int = 0
    keys: tuple[str, ...] = ("param", *MOMENT_KEYS)

    def add(self, tensors: Mapping[str, Any]) -> None:
        """Count the tensors of one parameter shard (``param`` and the moments; not ``step``)."""
        for key, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and key != "step":
                key = key if key in self.keys or "state" not in self.keys else "state"
                self.tensors[key] = self.tensors.get(key, 0) + 1
                self.elements[key] = self.elements.get(key, 0) + tensor.numel()

    def summed(self) -> LoadedState:
        """The counts summed over all ranks; collective over the default process group.

        Replicas (tensor-parallel duplicates, ranks of a non-distributed optimizer) count on each
        rank that holds them.
        """
        keys, n = self.keys, len(self.keys)
        flat = [self.tensors.get(k, 0) for k in keys] + [self.elements.get(k, 0) for k in keys]
        sums = agree.total([*flat, self.nonfinite])
        return LoadedState(
            tensors=dict(zip(keys, sums[:n], strict=True)),
            elements=dict(zip(keys, sums[n:-1], strict=True)),
            nonfinite=sums[-1],
            keys=keys,
        )

    def require_moments(self) -> None:
        """Raise where moments were to be kept and none arrived.

        Raises:
            CheckpointError: A moment has no element on any rank.
        """
        missing = [k for k in self.keys[1:] if not self.elements.get(k)]
        if missing:
            raise CheckpointError(
                f"no element of {' and '.join(missing)} was loaded on any rank, but the moments "
                "were to be kept: the checkpoint holds none, or its format is not read by this "
                "optimizer. Pass --no-load-optim to start with a new optimizer (the Adam moments "
                "are then lost)"
            )


@dataclass(frozen=True, eq=False)
class FillColumns:
    """Set every element to its column's value; not a rule of the fused op.

    The elements are filled before the others are changed, so that the statistics before count the
    new values.

    Args:
        values: ``[width]``, one for each index into the dimensions after the first.
    """

    values: torch.Tensor


@dataclass(frozen=True)
class RangeRule:
    """What is done to a range of a rank's flattened shard of one parameter.

    Args:
        begin: First element.
        end: One past the last.
        exp_avg: What is done to exp_avg.
        exp_avg_sq: What is done to exp_avg_sq.
        index: Where the elements lie in the unsharded parameter (`megatron_ext.layout.runs`).
    """

    begin: int
    end: int
    exp_avg: ElementRule | FillColumns = KEEP
    exp_avg_sq: ElementRule | FillColumns = KEEP
    index: GlobalIndex = WHOLE


@dataclass(frozen=True)
class MomentShard:
    """Adam's moments of one parameter on this rank, and what is to be done to them.

    Args:
        name: The parameter's name, the same on every layout: random rules depend on it.
        inner: The torch optimizer that holds the state (torch AdamW, TE or apex FusedAdam).
        param: The key of its state.
        rules: Ranges that do not overlap; what none covers is kept.
    """

    name: str
    inner: Any
    param: torch.Tensor
    rules: tuple[RangeRule, ...]


@dataclass(frozen=True)
class MomentStatistics:
    """One moment of one parameter shard, over all its elements.

    Args:
        norm_before: Euclidean norm before; None where only the new values were counted.
        norm_after: Euclidean norm after.
        largest: Largest absolute value after; NaN is left out.
        nonfinite: Number of NaN and infinite values after.
        changed: Number of elements whose value is another one; None as ``norm_before``.
    """

    norm_before: float | None
    norm_after: float
    largest: float
    nonfinite: int
    changed: int | None


def parameter_number(name: str) -> int:
    """64 bits of a parameter's name, for random rules: the same on every rank and layout."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@torch.no_grad()
def transform(
    shards: Sequence[MomentShard], statistics: Statistics = Statistics.NONE
) -> list[dict[str, MomentStatistics]]:
    """Apply rules to the moments in place; master weights are not touched.

    All shards of a device are one call of ``megatron_ext::transform_moments_``. Of TE's fp16 and
    fp8 moments, which have a scale per tensor, a rescale of the whole tensor changes the scale
    alone; other rules go through TE's ``get_unscaled_state`` and ``set_scaled_state``
    (transformer_engine/pytorch/optimizers/fused_adam.py).

    Args:
        shards: Parameters with state. Those without rules are only counted, if at all.
        statistics: What to count.

    Returns:
        For each shard its statistics by state key; empty dicts for `Statistics.NONE`.

    Raises:
        PlanError: A parameter has no moments.
        RuntimeError: Ranges that overlap or lie outside the shard (`megatron_ext._ops.schema`).
            Nothing has been written.
    """
    moments = [(_open(s, 0), _open(s, 1)) for s in shards]
    counts: list[torch.Tensor | None] = [None] * len(shards)
    by_device: dict[torch.device, list[int]] = {}
    for i, pair in enumerate(moments):
        if statistics or not all(m.only_scale for m in pair):
            by_device.setdefault(pair[0].tensor().device, []).append(i)
    calls = []
    for device, members in by_device.items():
        _announce(device.type)
        exp_avg, exp_avg_sq = ([moments[i][which].tensor() for i in members] for which in (0, 1))
        segments = [
            segment
            for tensor, i in enumerate(members)
            for segment in _segments(tensor, shards[i], exp_avg[tensor].numel(), statistics)
        ]
        calls.append((members, _ops.Transform.of(exp_avg, exp_avg_sq, segments)))
    fills = [_column_fills(shard, pair) for shard, pair in zip(shards, moments, strict=True)]
    if len(calls) > 1 or any(fills):
        # Bad ranges are refused on every device before anything is written on one.
        calls = [(members, call.prepare()) for members, call in calls]
    for fill in (f for of_shard in fills for f in of_shard):
        fill()
    for members, call in calls:
        for i, row in zip(members, call(statistics).cpu(), strict=False):
            counts[i] = row
    for pair in moments:
        for moment in pair:
            moment.close()
    return [_statistics(row) for row in counts]


@dataclass(frozen=True)
class Survey:
    """Both moments of some parameters, as they are.

    Args:
        nonfinite: For each parameter the number of NaN and infinite elements.
        norms: Euclidean norms of exp_avg and exp_avg_sq over all of them.
    """

    nonfinite: list[int]
    norms: tuple[float, float]


@torch.no_grad()
def survey(inner: Any, params: Sequence[torch.Tensor]) -> Survey:
    """Look at the moments of some parameters; reads them once, changes nothing.

    Args:
        inner: The torch optimizer that holds the state.
        params: Keys of its state, which have both moments.
    """
    if any(_is_scaled(inner, key) for key in MOMENT_KEYS):
        counted = transform([MomentShard("", inner, p, ()) for p in params], Statistics.AFTER)
        norms = [math.hypot(*(c[key].norm_after for c in counted)) for key in MOMENT_KEYS]
        return Survey([sum(s.nonfinite for s in c.values()) for c in counted], tuple(norms))  # type: ignore[arg-type]
    counts, squares = [0] * len(params), [0.0, 0.0]
    by_device: dict[torch.device, list[int]] = {}
    for i, param in enumerate(params):
        by_device.setdefault(inner.state[param]["exp_avg"].device, []).append(i)
    for device, members in by_device.items():
        _announce(device.type)
        both = ([inner.state[params[i]][key] for i in members] for key in MOMENT_KEYS)
        found = _ops.Transform.keep(*both)(Statistics.AFTER)[:, :, _SURVEYED].tolist()
        for i, rows in zip(members, found, strict=True):
            for which, (square, nonfinite) in enumerate(rows):
                squares[which] += square
                counts[i] += int(nonfinite)
    return Survey(counts, (math.sqrt(squares[0]), math.sqrt(squares[1])))


def magnitude_thresholds(
    shards: Sequence[MomentShard],
    key: str,
    groups: Sequence[int],
    quantiles: Sequence[float],
    reduce: Callable[[torch.Tensor], object] | None = None,
) -> list[float]:
    """The p-quantile of abs(exp_avg) or abs(exp_avg_sq), for groups of whole parameters.

    Args:
        shards: This rank's parameters, on one device.
        key: ``exp_avg`` or ``exp_avg_sq``.
        groups: For each shard the number of its group.
        quantiles: p of each group, in [0, 1].
        reduce: Adds a histogram up over the ranks that hold the groups' other shards, in place;
            called three times (see `megatron_ext._ops.magnitude_thresholds`). None: one rank.
    """
    which = MOMENT_KEYS.index(key)
    tensors = [_open(s, which).tensor() for s in shards]
    ranges = [[i, 0, x.numel(), g] for i, (x, g) in enumerate(zip(tensors, groups, strict=True))]
    out = _ops.magnitude_thresholds(
        tensors,
        torch.tensor(ranges, dtype=torch.int64).reshape(-1, 4),
        torch.tensor(quantiles, dtype=torch.float64),
        reduce,
    )
    return [float(x) for x in out.tolist()]


def values(inner: Any, param: torch.Tensor, key: str) -> torch.Tensor:
    """One moment as flat fp32, bf16 or fp16 values; of a scaled one a copy in fp32."""
    if _is_scaled(inner, key):
        unscaled: torch.Tensor = inner.get_unscaled_state(param, key)
        return unscaled.view(-1)
    held: torch.Tensor = inner.state[param][key]
    return held.view(-1)


@dataclass(frozen=True)
class _Moment:
    """One moment of a shard.

    Args:
        tensor: The values to work on: the state itself, or a copy of a scaled one.
        close: Brings the result back to where it belongs.
        only_scale: Whether `close` alone does all there is to do.
    """

    tensor: Callable[[], torch.Tensor]
    close: Callable[[], None] = lambda: None
    only_scale: bool = False


def _open(shard: MomentShard, which: int) -> _Moment:
    key = MOMENT_KEYS[which]
    state = shard.inner.state.get(shard.param, {})
    if key not in state:
        raise PlanError(f"{shard.name} has no {key} to change: the optimizer has no state for it")
    if not _is_scaled(shard.inner, key):
        return _Moment(lambda: state[key])
    rules = _rules(shard, which)
    factor = _whole_scale(shard, rules, state[key].numel())
    # One copy in fp32, made when it is first asked for.
    unscaled = functools.cache(lambda: shard.inner.get_unscaled_state(shard.param, key))
    if factor is not None:
        rescale = functools.partial(_rescale, shard.inner, shard.param, key, factor)
        return _Moment(unscaled, rescale, only_scale=True)
    if all(r == KEEP for r in rules):
        return _Moment(unscaled, only_scale=True)
    return _Moment(unscaled, lambda: shard.inner.set_scaled_state(shard.param, key, unscaled()))


def _is_scaled(inner: Any, key: str) -> bool:
    """Whether TE keeps this moment in fp16 or fp8 with a scale per tensor."""
    dtypes = getattr(inner, "name_to_dtype_map", {})
    return dtypes.get(key) in (torch.float16, torch.uint8)


def _rules(shard: MomentShard, which: int) -> list[ElementRule | FillColumns]:
    return [r.exp_avg_sq if which else r.exp_avg for r in shard.rules]


def _whole_scale(
    shard: MomentShard, rules: Sequence[ElementRule | FillColumns], numel: int
) -> float | None:
    """The factor, if the one thing that is done is to multiply all elements by one above 0."""
    if len(rules) != 1 or (shard.rules[0].begin, shard.rules[0].end) != (0, numel):
        return None
    rule = rules[0]
    if isinstance(rule, FillColumns) or rule == KEEP:
        return None
    return rule.multiplier if rule.multiplier is not None and rule.multiplier > 0.0 else None


def _rescale(inner: Any, param: torch.Tensor, key: str, factor: float) -> None:
    """Multiply a scaled moment through its scale.

    fp16: value = stored * _scales. fp8 (Float8Tensor): value = stored * _scale_inv, and the
    quantizer has its reciprocal.
    """
    inner._scales[param][key].mul_(factor)
    stored = inner.state[param][key]
    if hasattr(stored, "_scale_inv"):
        stored._scale_inv.mul_(factor)
        stored._quantizer.scale.div_(factor)


def _segments(tensor: int, shard: MomentShard, numel: int, statistics: Statistics) -> list[Segment]:
    number = parameter_number(shard.name)
    out = [
        Segment(tensor, r.begin, r.end, _of_op(r.exp_avg), _of_op(r.exp_avg_sq), r.index, number)
        for r in shard.rules
    ]
    if statistics:
        # What no rule covers counts too.
        at = 0
        for rule in sorted(shard.rules, key=lambda r: r.begin):
            if at < rule.begin:
                out.append(Segment(tensor, at, rule.begin))
            at = max(at, rule.end)
        if at < numel:
            out.append(Segment(tensor, at, numel))
    return out


def _of_op(rule: Any) -> Any:
    """What the fused op is told; columns have been filled before it."""
    return KEEP if isinstance(rule, FillColumns) else rule


def _column_fills(
    shard: MomentShard, pair: tuple[_Moment, _Moment]
) -> list[Callable[[], torch.Tensor]]:
    out: list[Callable[[], torch.Tensor]] = []
    for which, moment in enumerate(pair):
        for r, rule in zip(shard.rules, _rules(shard, which), strict=True):
            if isinstance(rule, FillColumns):
                run = Run(r.begin, r.end, r.index)
                out.append(functools.partial(_fill_columns, moment, run, rule.values))
    return out


def _fill_columns(moment: _Moment, run: Run, values: torch.Tensor) -> torch.Tensor:
    target = moment.tensor().view(-1)[run.begin : run.end]
    values = values.to(target.device, torch.float32)
    for begin in range(0, run.end - run.begin, _COLUMNS_AT_A_TIME):
        end = min(begin + _COLUMNS_AT_A_TIME, run.end - run.begin)
        column = columns(run, begin, end, len(values), target.device)
        target[begin:end] = values[column].to(target.dtype)
    return target


def _statistics(row: torch.Tensor | None) -> dict[str, MomentStatistics]:
    if row is None:
        return {}
    out = {}
    for key, (before, after, largest, nonfinite, changed) in zip(
        MOMENT_KEYS, row.tolist(), strict=True
    ):
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
def _announce(device: str) -> None:
    """Say once which kernel does the work, and why."""
    if device in _ops.DEVICES:
        kernel = _ops.kernel(device)
        name = "compiled" if kernel.native else "reference"
        say(f"megatron_ext: moments on {device}: {name} kernel ({kernel.reason})")
