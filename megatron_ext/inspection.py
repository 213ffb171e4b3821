"""What a checkpoint says of itself, for people, and how two checkpoints differ.

`inspect_checkpoint` gathers what `stored.py` reads; the moments are described from the index of the
store, not from their elements (`moment_scan.py` reads those). Nothing is printed here.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .checkpoint import SavedOptimizer
from .errors import CheckpointError
from .phase import Mark
from .plan import match_groups
from .stored import COMMON, StoredCheckpoint, open_checkpoint

#: A tensor of an optimizer's state: by parameter ("optimizer.state.exp_avg.NAME") or by bucket
#: ("optimizer.distributed.dp_group_idx_0. ... .bucket_idx_0.exp_avg"), in a chain with its number
#: (core/optimizer/distrib_optimizer.py, 0.19.2).
_STATE_KEY = re.compile(
    r"(?:chained_(?P<number>\d+)\.)?optimizer\."
    r"(?:state\.(?P<state>[^.]+)\.(?P<parameter>.+)"
    r"|distributed\.(?P<bucket>.+)\.(?P<bucket_state>[^.]+))",
    re.DOTALL,
)

#: What is shown of the layout -> the saved argument.
_LAYOUT = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
    "dp": "data_parallel_size",
    "world": "world_size",
}
_LEGACY_DIRECTORY = re.compile(r"mp_rank_(?P<tp>\d+)(?:_(?P<pp>\d{3}))?(?:_(?P<ep>\d{3}))?")

#: Names under which a version might be recorded; Megatron itself up to 0.19 records none.
_VERSIONS = ("megatron_core_version", "mcore_version", "megatron_version")

_COUNTERS = (
    "consumed_train_samples",
    "consumed_valid_samples",
    "skipped_train_samples",
    "consumed_train_tokens",
    "num_floating_point_operations_so_far",
)


@dataclass(frozen=True)
class StateKey:
    """What a checkpoint key says of a tensor of an optimizer's state.

    Args:
        optimizer: Its number in the chain; None where the key does not say.
        state: ``exp_avg``, ``exp_avg_sq``, ``param`` and so on.
        name: The parameter, or the bucket.
        bucket: Whether `name` is a bucket's.
    """

    optimizer: int | None
    state: str
    name: str
    bucket: bool


@dataclass(frozen=True)
class StateTensors:
    """The tensors of one state key and dtype, from the index.

    Args:
        optimizer: Number in the chain; None where the keys do not say.
        state: ``exp_avg`` and so on.
        dtype: ``float32`` and so on.
        by: What a tensor holds: a parameter, or a bucket of many.
        tensors: Keys.
        chunks: Pieces in which they are stored.
        elements: Of all tensors, padding included.
        size: Bytes of the elements.
    """

    optimizer: int | None
    state: str
    dtype: str
    by: Literal["parameter", "bucket"]
    tensors: int
    chunks: int
    elements: int
    size: int


@dataclass(frozen=True)
class OptimizerState:
    """One Megatron optimizer of the chain.

    Args:
        groups: param_groups with all hyperparameters.
        step: Optimizer steps taken, or None.
        mark: The phase, or None.
        grad_scaler: Its state, or None.
    """

    groups: tuple[Mapping[str, Any], ...]
    step: int | None
    mark: Mark | None
    grad_scaler: Mapping[str, Any] | None


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint says of itself.

    Args:
        directory: The iteration's own.
        iteration: Its number, 0 for a release.
        release: Whether it is a release checkpoint.
        format: ``torch_dist`` or ``torch``.
        megatron_core: The recorded version, or None: Megatron itself up to 0.19 records none.
        written_by: What the form of the checkpoint says of the version.
        layout: tp, pp, vpp, cp, ep, etp, dp and world -> size, where recorded.
        sharding_type: See `megatron_ext.stored.StoredCheckpoint`.
        optimizers: The chain.
        scheduler: State of OptimizerParamScheduler, or None.
        num_steps: The scheduler's position in samples, or None.
        counters: Name -> number.
        args: The saved arguments.
        moments: From the index; empty for legacy ``torch``.
        notes: What could not be said, and why.
    """

    directory: Path
    iteration: int
    release: bool
    format: str
    megatron_core: str | None
    written_by: str
    layout: Mapping[str, int]
    sharding_type: str | None
    optimizers: tuple[OptimizerState, ...]
    scheduler: Mapping[str, Any] | None
    num_steps: int | None
    counters: Mapping[str, int | float]
    args: Mapping[str, Any]
    moments: tuple[StateTensors, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Difference:
    """One difference.

    Args:
        section: ``args``, ``groups``, ``scheduler`` and so on.
        name: What differs.
        a: In the first checkpoint; None where it is not there.
        b: In the second.
        only: ``a`` or ``b`` where it is in one only.
    """

    section: str
    name: str
    a: Any
    b: Any
    only: Literal["a", "b"] | None = None


def inspect_checkpoint(
    checkpoint: str | Path | StoredCheckpoint, iteration: int | None = None
) -> Inspection:
    """Say what a checkpoint holds, without a tensor.

    Args:
        checkpoint: What is given to ``--load``, one iteration's own directory, or what
            `megatron_ext.stored.open_checkpoint` gave.
        iteration: Which one; the tracker file's by default.

    Returns:
        All of it as plain data.

    Raises:
        CheckpointError: There is none, it is of another kind, or damaged; a file that is not read
            is missing or too short.
    """
    if isinstance(checkpoint, StoredCheckpoint):
        stored = checkpoint
    else:
        stored = open_checkpoint(checkpoint, iteration)
    stored.require_files()
    moments = _moments(stored)
    scheduler = stored.scheduler
    position = scheduler.get("num_steps") if isinstance(scheduler, Mapping) else None
    return Inspection(
        directory=stored.directory,
        iteration=stored.iteration,
        release=stored.release,
        format=stored.format,
        megatron_core=_recorded_version(stored),
        written_by=_written_by(stored),
        layout=_layout(stored),
        sharding_type=stored.sharding_type,
        optimizers=_optimizers(stored),
        scheduler=scheduler,
        num_steps=position,
        counters=_counters(stored),
        args=stored.args,
        moments=moments,
        notes=tuple(_notes(stored, moments)),
    )


def parse_state_key(key: str) -> StateKey | None:
    """Read a checkpoint key.

    Args:
        key: Of the store.

    Returns:
        None where it is no tensor of an optimizer's state.
    """
    found = _STATE_KEY.fullmatch(key)
    if found is None:
        return None
    number = None if found["number"] is None else int(found["number"])
    if found["state"] is not None:
        return StateKey(number, found["state"], found["parameter"], False)
    return StateKey(number, found["bucket_state"], found["bucket"], True)


def state_dtype(entry: Any) -> Any:
    """The torch dtype of a tensor's entry in the index (an `inert.Inert` of torch's)."""
    properties = entry.properties
    state = getattr(properties, "inert_state", None)
    return state[0] if state else properties.dtype


def plain(value: Any) -> Any:
    """A value of a checkpoint as what JSON knows: no NaN, no tuple, no object.

    Args:
        value: Anything; what JSON does not know becomes its repr.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(v) for v in value), key=repr)
    return str(value)


def compare(a: Inspection, b: Inspection) -> tuple[Difference, ...]:
    """How two checkpoints differ; the moments' elements aside.

    Args:
        a: The first.
        b: The second.

    Returns:
        Differences in the order in which they are worth reading.
    """
    changes = [*_compare_scalars(a, b)]
    changes += _compare_mappings("layout", a.layout, b.layout)
    changes += _compare_optimizers(a.optimizers, b.optimizers)
    changes += _compare_mappings("scheduler", a.scheduler or {}, b.scheduler or {})
    changes += _compare_mappings("counters", a.counters, b.counters)
    changes += _compare_mappings("moments", _described(a.moments), _described(b.moments))
    changes += _compare_mappings("args", a.args, b.args)
    return tuple(changes)


def _moments(stored: StoredCheckpoint) -> tuple[StateTensors, ...]:
    if stored.store is None:
        return ()
    totals: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    try:
        for key, entry in stored.store.index.state_dict_metadata.items():
            if not hasattr(entry, "size") or (found := parse_state_key(key)) is None:
                continue
            dtype = state_dtype(entry)
            total = totals[found.optimizer, found.state, dtype, found.bucket]
            elements = math.prod(entry.size)
            for i, n in enumerate((1, len(entry.chunks), elements, elements * dtype.itemsize)):
                total[i] += n
    except (AttributeError, TypeError, IndexError) as e:
        raise CheckpointError(
            f"{stored.directory}: expected tensors as torch describes them in .metadata, found an "
            f"entry that is not: {e}. Restore the checkpoint or load another iteration"
        ) from e
    order = sorted(totals, key=lambda k: (k[0] is not None, k[0] or 0, k[1], str(k[2]), k[3]))
    return tuple(
        StateTensors(
            number,
            state,
            str(dtype).removeprefix("torch."),
            "bucket" if bucket else "parameter",
            *totals[number, state, dtype, bucket],
        )
        for number, state, dtype, bucket in order
    )


def _notes(stored: StoredCheckpoint, moments: Sequence[StateTensors]) -> Iterator[str]:
    if not stored.optimizers:
        yield "no optimizer state"
    elif stored.store is None:
        yield (
            "moments: the format torch has no metadata of its tensors, and --moments reads "
            "torch_dist only; save with --ckpt-format torch_dist to see them"
        )
    elif not moments:
        yield f"moments: none are stored as tensors (sharding {stored.sharding_type})"
    if not stored.args:
        yield "no arguments were saved"


def _optimizers(stored: StoredCheckpoint) -> tuple[OptimizerState, ...]:
    return tuple(
        OptimizerState(o.groups, o.step, _mark(o, stored.directory), _values(scaler))
        for o, scaler in zip(stored.optimizers, stored.grad_scalers, strict=True)
    )


def _values(state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Tensors of one element, as a loss scale is, as numbers."""
    return None if state is None else {k: getattr(v, "value", v) for k, v in state.items()}


def _mark(optimizer: SavedOptimizer, directory: Path) -> Mark | None:
    try:
        return None if optimizer.mark is None else Mark.parse(optimizer.mark)
    except CheckpointError as e:
        raise CheckpointError(f"{directory}: {e}") from e


def _recorded_version(stored: StoredCheckpoint) -> str | None:
    metadata = stored.other.get("content_metadata")
    for place in (stored.other, stored.args, metadata if isinstance(metadata, Mapping) else {}):
        for name in _VERSIONS:
            if place.get(name) is not None:
                return str(place[name])
    return None


def _written_by(stored: StoredCheckpoint) -> str:
    if stored.store is None:
        return "any: the format torch does not say"
    if (stored.directory / COMMON).is_file():
        return f"0.18 or earlier: {COMMON} beside the store"
    return "0.19 or later: common_state in the store"


def _layout(stored: StoredCheckpoint) -> dict[str, int]:
    named = {k: stored.args.get(name) for k, name in _LAYOUT.items()}
    layout = {k: v for k, v in named.items() if isinstance(v, int)}
    if stored.format == "torch":
        # One directory for each model-parallel rank.
        for path in stored.directory.glob("mp_rank_*"):
            if found := _LEGACY_DIRECTORY.fullmatch(path.name):
                for key, rank in found.groupdict().items():
                    if rank is not None and not isinstance(named[key], int):
                        layout[key] = max(layout.get(key, 1), int(rank) + 1)
    if "dp" not in layout and "world" in layout:
        model_parallel = math.prod(layout.get(k, 1) for k in ("tp", "pp", "cp"))
        layout["dp"] = layout["world"] // max(1, model_parallel)
    return {k: layout[k] for k in _LAYOUT if k in layout}


def _counters(stored: StoredCheckpoint) -> dict[str, int | float]:
    places = {**stored.args, **stored.other}
    found = {name: places.get(name) for name in _COUNTERS}
    return {k: v for k, v in found.items() if isinstance(v, int | float)}


def _described(moments: Sequence[StateTensors]) -> dict[str, str]:
    described: dict[str, str] = {}
    for m in moments:
        chain = "" if m.optimizer is None else f"optimizer {m.optimizer} "
        text = f"{m.tensors} tensors by {m.by}, {m.elements} elements"
        described[f"{chain}{m.state} {m.dtype}"] = text
    return described


def _compare_scalars(a: Inspection, b: Inspection) -> Iterator[Difference]:
    for name in ("iteration", "release", "format", "megatron_core", "sharding_type"):
        one, other = getattr(a, name), getattr(b, name)
        if one != other:
            yield Difference("checkpoint", name, one, other)


def _compare_mappings(
    section: str, a: Mapping[Any, Any], b: Mapping[Any, Any], prefix: str = ""
) -> Iterator[Difference]:
    for key in [*a, *(k for k in b if k not in a)]:
        name = f"{prefix}{key}"
        if key not in b:
            yield Difference(section, name, a[key], None, "a")
        elif key not in a:
            yield Difference(section, name, None, b[key], "b")
        elif not _same(a[key], b[key]):
            yield Difference(section, name, a[key], b[key])


def _same(a: Any, b: Any) -> bool:
    """Lists and tuples alike, and NaN as NaN."""
    return a is b or plain(a) == plain(b)


def _compare_optimizers(
    a: Sequence[OptimizerState], b: Sequence[OptimizerState]
) -> Iterator[Difference]:
    for number in range(max(len(a), len(b))):
        where = f"optimizer {number}" if max(len(a), len(b)) > 1 else "optimizer"
        if number >= len(b):
            yield Difference("optimizers", where, f"{len(a[number].groups)} groups", None, "a")
        elif number >= len(a):
            yield Difference("optimizers", where, None, f"{len(b[number].groups)} groups", "b")
        else:
            yield from _compare_optimizer(where, a[number], b[number])


def _compare_optimizer(where: str, a: OptimizerState, b: OptimizerState) -> Iterator[Difference]:
    if a.step != b.step:
        yield Difference("optimizers", f"{where} step", a.step, b.step)
    marks = [None if mark is None else str(mark) for mark in (a.mark, b.mark)]
    # Their own comparison leaves the words of a phase out.
    if marks[0] != marks[1]:
        yield Difference("optimizers", f"{where} phase", marks[0], marks[1])
    scalers = a.grad_scaler or {}, b.grad_scaler or {}
    yield from _compare_mappings("optimizers", *scalers, prefix=f"{where} grad_scaler ")
    pairs = pair_groups(a.groups, b.groups)
    for i, j in pairs:
        if i is not None and j is not None:
            name = f"{where} group {i}" + ("" if i == j else f" -> {j}")
            yield from _compare_mappings("groups", a.groups[i], b.groups[j], prefix=f"{name} ")
        elif i is not None:
            yield Difference("groups", f"{where} group {i}", dict(a.groups[i]), None, "a")
        elif j is not None:
            yield Difference("groups", f"{where} group {j}", None, dict(b.groups[j]), "b")


def pair_groups(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]
) -> list[tuple[int | None, int | None]]:
    """Pair param_groups as a resume does; what is ambiguous then by structural keys and position.

    Args:
        a: Groups of one checkpoint.
        b: Groups of the other.

    Returns:
        Pairs of indices; None where there is no counterpart.
    """
    found = match_groups(a, b, [0] * len(a), [0] * len(b))
    pair = {i: j for j, i in enumerate(found) if i is not None}
    for i in (i for i in range(len(a)) if i not in pair):
        free = [j for j in range(len(b)) if j not in pair.values()]
        twins = [j for j in free if match_groups([a[i]], [b[j]], [0], [0]) == [0]]
        if twins:
            pair[i] = twins[0]
    only_b = [(None, j) for j in range(len(b)) if j not in pair.values()]
    return [*((i, pair.get(i)) for i in range(len(a))), *only_b]
