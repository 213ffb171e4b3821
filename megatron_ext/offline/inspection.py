"""Summarise a checkpoint for people.

The moments are described from the index of the store; `.moment_scan` reads their elements. Nothing
is printed here.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..base.schema import Count, Keywords, Real
from ..base.text import Summary
from ..checkpoint.state import SavedOptimizer
from ..checkpoint.state_keys import parse_state_key, state_dtype
from ..checkpoint.store import COMMON
from ..checkpoint.stored import StoredCheckpoint, open_checkpoint
from ..errors import CheckpointError
from ..host.formats import COMMON_IN_STORE
from ..policy.phase import Mark
from .master_proof import ONLY_HALF, has_remainders

#: Short name of a parallel size -> the saved argument.
_PARALLEL_SIZES = {
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
#: Keys under which a version might be recorded. Megatron itself records none, up to 0.19.
_VERSIONS = ("megatron_core_version", "mcore_version", "megatron_version")
_SAVED_COUNTERS = (
    "consumed_train_samples",
    "consumed_valid_samples",
    "skipped_train_samples",
    "consumed_train_tokens",
    "num_floating_point_operations_so_far",
)


@dataclass(frozen=True)
class StateTensors:
    """The tensors of one state key and dtype, from the index.

    Args:
        optimizer: Number in the chain; None if the keys do not hold it.
        state: ``exp_avg`` and so on.
        dtype: ``float32`` and so on.
        by: Whether a tensor holds one parameter or a bucket of many.
        tensors: Number of tensors.
        chunks: Number of stored pieces.
        elements: Number of elements of all tensors, including padding.
        size: Size of the elements in bytes.
    """

    optimizer: int | None
    state: str
    dtype: str
    by: Literal["parameter", "bucket"]
    tensors: Count
    chunks: Count
    elements: Count
    size: Count


@dataclass(frozen=True)
class OptimizerState:
    """One Megatron optimizer of the chain.

    Args:
        groups: The param_groups with all hyperparameters.
        step: Optimizer steps taken, or None.
        mark: The mark of the phase, or None.
        grad_scaler: State of the grad scaler, or None.
    """

    groups: tuple[Mapping[str, Any], ...]
    step: int | None
    mark: Mark | None
    grad_scaler: Mapping[str, Any] | None


@dataclass(frozen=True, repr=False)
class Inspection(Summary):
    """The summary of a checkpoint.

    Args:
        directory: The directory of the iteration.
        iteration: Its number, 0 for a release.
        release: Whether it is a release checkpoint.
        format: ``torch_dist`` or ``torch``.
        megatron_core: The recorded version, or None: Megatron itself records none, up to 0.19.
        written_by: The versions that write this form of checkpoint.
        layout: Parallel layout: tp, pp, vpp, cp, ep, etp, dp and world -> size, if recorded.
        sharding_type: See `megatron_ext.checkpoint.stored.StoredCheckpoint`.
        optimizers: The optimizers of the chain.
        scheduler: State of OptimizerParamScheduler, or None.
        num_steps: The scheduler's position in samples, or None.
        counters: Name -> number.
        args: The saved arguments.
        moments: Tensors of the optimizer's state; empty for legacy ``torch``.
        notes: Facts that are missing, with the reason.
    """

    directory: Path
    iteration: int
    release: bool
    format: Literal["torch_dist", "torch"]
    megatron_core: str | None
    written_by: str
    layout: Annotated[Mapping[str, int], Keywords(propertyNames={"enum": list(_PARALLEL_SIZES)})]
    sharding_type: str | None
    optimizers: tuple[OptimizerState, ...]
    scheduler: Mapping[str, Any] | None
    num_steps: Annotated[int | None, Keywords(of=Any)]
    counters: Mapping[str, Real]
    args: Mapping[str, Any]
    moments: tuple[StateTensors, ...]
    notes: tuple[str, ...]

    def summary(self) -> dict[str, object]:
        """Return the facts that tell checkpoints apart."""
        return {
            "directory": self.directory,
            "format": " ".join(filter(None, (self.format, self.sharding_type))),
            "iteration": "release" if self.release else self.iteration,
            "optimizers": len(self.optimizers),
            "parallel sizes": " ".join(f"{k}={v}" for k, v in self.layout.items()) or "unknown",
        }


def inspect_checkpoint(
    checkpoint: str | Path | StoredCheckpoint, iteration: int | None = None
) -> Inspection:
    """Summarise a checkpoint without reading a tensor.

    Args:
        checkpoint: The directory given to ``--load``, the directory of one iteration, or a
            checkpoint from `megatron_ext.checkpoint.stored.open_checkpoint`.
        iteration: The iteration to read; by default the one in the tracker file.

    Returns:
        The summary as plain data.

    Raises:
        CheckpointError: The checkpoint is missing, damaged or of another kind, or a file that is
            not read is missing or too short.
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
            "torch_dist only. Save with --ckpt-format torch_dist to see them"
        )
    elif not moments:
        yield f"moments: none are stored as tensors (sharding {stored.sharding_type})"
    if has_remainders(stored):
        yield f"moments: the elements of param are no master weights: {ONLY_HALF}"
    if not stored.args:
        yield "no arguments were saved"


def _optimizers(stored: StoredCheckpoint) -> tuple[OptimizerState, ...]:
    return tuple(
        OptimizerState(o.groups, o.step, _mark(o, stored.directory), _values(scaler))
        for o, scaler in zip(stored.optimizers, stored.grad_scalers, strict=True)
    )


def _values(state: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Replace tensors of one element, such as a loss scale, by numbers."""
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
        return "any version: the format torch does not record it"
    if stored.store.common_in_store:
        return f"{COMMON_IN_STORE} or later: common_state in the store"
    return f"0.18 or earlier: {COMMON} beside the store"


def _layout(stored: StoredCheckpoint) -> dict[str, int]:
    named = {k: stored.args.get(name) for k, name in _PARALLEL_SIZES.items()}
    layout = {k: v for k, v in named.items() if isinstance(v, int)}
    if stored.format == "torch":
        # Each model-parallel rank has its own directory.
        for path in stored.directory.glob("mp_rank_*"):
            if found := _LEGACY_DIRECTORY.fullmatch(path.name):
                for key, rank in found.groupdict().items():
                    if rank is not None and not isinstance(named[key], int):
                        layout[key] = max(layout.get(key, 1), int(rank) + 1)
    if "dp" not in layout and "world" in layout:
        model_parallel = math.prod(layout.get(k, 1) for k in ("tp", "pp", "cp"))
        layout["dp"] = layout["world"] // max(1, model_parallel)
    return {k: layout[k] for k in _PARALLEL_SIZES if k in layout}


def _counters(stored: StoredCheckpoint) -> dict[str, int | float]:
    places = {**stored.args, **stored.other}
    found = {name: places.get(name) for name in _SAVED_COUNTERS}
    return {k: v for k, v in found.items() if isinstance(v, int | float)}
