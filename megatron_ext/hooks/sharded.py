"""Wrap `dist_checkpointing.load`: misfit errors, unread moments, and rows that are not saved."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from ..base import ranks
from ..base.log import say
from ..checkpoint.state import does_not_fit, misfits, other_precision
from ..checkpoint.stored import open_checkpoint
from ..errors import CheckpointError, MegatronExtError
from ..policy.phase import Mark, decide
from ..resume import precision, selective_read, vocabulary
from ..resume.other_optimizer import fit_chain
from ..resume.parameter_map import Rewritten, separate
from ..resume.session import Resume, current
from ..resume.vocabulary import RowChanges
from . import reading
from .mapped import rewrite_request

#: Every checkpoint key of an optimizer's entries contains it (`chained_<i>.` may precede it).
_OPTIMIZER_PREFIX = "optimizer."


def load_sharded(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `dist_checkpointing.load`, so that its errors list the entries that do not fit."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        if not current.built:
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        with reading.files_of(bound.arguments):
            return _load(original, bound)

    return load


def _load(original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
    call = bound.arguments
    # The load removes the sharded entries from the dict, so that they are listed before it.
    requested = _optimizer_entries(call["sharded_state_dict"])
    rows = RowChanges() if current.load is None else current.load.rows
    rewritten = _mapped(call, requested)
    resized = _resized(call["sharded_state_dict"], call["checkpoint_dir"], requested, rows)
    if not requested:
        say(resized.lines())  # no optimizer is loaded whose report would have them
        rows.clear()
    optimizers = dict(call["sharded_state_dict"].get("optimizer") or {})
    removed = _remove_overwritten(call)
    if current.load is not None:
        precision.load_whole_masters(
            optimizers, functools.partial(_stored_dtypes, call["checkpoint_dir"])
        )
    if rewritten is not None:
        separate(call["sharded_state_dict"], rewritten)
    try:
        result = original(*bound.args, **bound.kwargs)
        # With some values of `strict` the result is a tuple that has the keys that did not fit.
        loaded = result[0] if isinstance(result, tuple) else result
        removed.fill_with_zeros(loaded)
        resized.put_back(loaded)
        if current.load is not None and current.load.mapped is not None and optimizers:
            fit_chain(optimizers, loaded["optimizer"])
        if rewritten is not None:
            rewritten.finish(loaded, functools.partial(_more, original, call["checkpoint_dir"]))
        return result
    except (Exception, CheckpointException) as e:
        rows.clear()
        stored = _stored_entries(call["checkpoint_dir"])
        lines = misfits(requested, stored)
        if not lines or rewritten is not None:
            raise reading.cause(e) from e
        if not any(_OPTIMIZER_PREFIX in key for key in stored):
            raise no_optimizer_state(call["checkpoint_dir"]) from e
        if (other := other_precision(requested, stored)) is not None:
            raise other from e
        raise does_not_fit([f"in {call['checkpoint_dir']}:", *lines]) from e


def _mapped(call: dict[str, Any], requested: Mapping[str, Any]) -> Rewritten | None:
    """Apply the parameter map, if the load fills optimizers whose state has parameters' names."""
    load = current.load
    # If only some ranks load, they cannot agree over the default group.
    if load is None or not load.awaits_tensors or call.get("process_group") is not None:
        return None
    if vocabulary.by_bucket(requested):
        return None
    try:
        stored = _stored_entries(call["checkpoint_dir"])
    except Exception:  # not torch_dist, or damaged: the load itself raises an error
        stored = {}
    begins = functools.partial(_phase_begins, load.resume, call["checkpoint_dir"])
    return rewrite_request(load, call, stored, begins)


def _more(
    original: Callable[..., Any], directory: Any, entries: dict[str, Any]
) -> Mapping[str, Any]:
    """Load further entries without a collective."""
    result: Mapping[str, Any] = original(entries, directory, validate_access_integrity=False)
    return result


def _remove_overwritten(call: dict[str, Any]) -> selective_read.RemovedEntries:
    """Remove the moments that the policy overwrites from a load, if a phase begins with it.

    Rank 0 reads whether the phase begins and broadcasts it, so that ranks without a matching rule
    take part too. Stock checks that each tensor is requested completely and once. That check runs
    before the removal, with the same collective.

    Args:
        call: The arguments of ``dist_checkpointing.load``. They are modified in place.
    """
    load = current.load
    if load is None or not load.awaits_tensors:
        return selective_read.RemovedEntries()
    load.awaits_tensors, load.unread, resume = False, {}, load.resume
    # If only some ranks load, they cannot agree over the default group.
    partly = call.get("process_group") is not None
    if not resume.policy.overwrites_moments or partly or _strict(call):
        return selective_read.RemovedEntries()
    if not _phase_begins(resume, call["checkpoint_dir"]):
        return selective_read.RemovedEntries()
    if call.get("validate_access_integrity", True):
        validation = importlib.import_module("megatron.core.dist_checkpointing.validation")
        mapping = importlib.import_module("megatron.core.dist_checkpointing.mapping")
        entries = _built(call["sharded_state_dict"], mapping)
        validation.validate_sharding_integrity(validation.determine_global_metadata(entries)[1])
        call["validate_access_integrity"] = False
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    removed = selective_read.remove_marked(call["sharded_state_dict"], whole=alone)
    load.unread = removed.names
    return removed


def _strict(call: Mapping[str, Any]) -> bool:
    """Whether stock would report the removed entries as missing from the request."""
    validation = importlib.import_module("megatron.core.dist_checkpointing.validation")
    handling = validation.StrictHandling
    strict = validation.parse_strict_flag(call.get("strict", handling.ASSUME_OK_UNEXPECTED))
    return bool(handling.requires_global_app_metadata(strict))


def _phase_begins(resume: Resume, directory: Any) -> bool:
    """Whether the requested phase begins with this checkpoint; collective.

    Rank 0 reads the saved param_groups. If it cannot read them, or the phase cannot begin there,
    everything is read, and a later check raises the error.
    """

    def begins() -> bool:
        found = None if current.preflight is None else current.preflight.found
        if found is not None and found.phase is not None and found.directory == Path(directory):
            return found.phase.state == "applied"
        try:
            saved = open_checkpoint(directory).optimizers[0]
            mark = None if saved.mark is None else Mark.parse(saved.mark)
            return decide(resume.policy, mark, "", resume.where).state == "applied"
        except (MegatronExtError, OSError, IndexError):
            return False

    return ranks.broadcast_from_rank_0(begins)


def _built(state_dict: Any, mapping: Any) -> list[Any]:
    """List the entries of a sharded state dict, with its factories built."""
    out: list[Any] = []
    utils = importlib.import_module("megatron.core.dist_checkpointing.dict_utils")
    for entry in utils.nested_values(state_dict):
        if isinstance(entry, mapping.ShardedTensorFactory):
            out += _built({"": entry.build()}, mapping)
        elif isinstance(entry, mapping.ShardedTensor | mapping.ShardedObject):
            out.append(entry)
    return out


def _resized(
    state_dict: Any, directory: Any, requested: Mapping[str, Any], rows: RowChanges
) -> vocabulary.Resized:
    """Find the entries of a resume whose number of rows differs from the checkpoint's.

    Raises:
        CheckpointError: The stored optimizer state fits only the old number; on every rank.
    """
    if not requested and current.load is None:
        return vocabulary.Resized()
    mapping = importlib.import_module("megatron.core.dist_checkpointing.mapping")

    def stored() -> Mapping[str, tuple[int, ...] | None]:
        try:
            return _stored_entries(directory)
        except Exception:  # not torch_dist, or damaged: the load itself raises an error
            return {}

    resized = vocabulary.find_resized(
        state_dict, mapping.ShardedTensor, _OPTIMIZER_PREFIX, stored, rows
    )
    error = vocabulary.unsupported(resized, requested)
    if error is not None:
        rows.clear()
    if vocabulary.by_bucket(requested) and _has_stages_without_vocabulary():
        ranks.stop_together("comparing the size of the vocabulary", error)
    elif error is not None:
        raise error
    return resized


def _has_stages_without_vocabulary() -> bool:
    """Whether a pipeline stage has neither the embedding nor the output layer."""
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    return int(parallel_state.get_pipeline_model_parallel_world_size()) > 2


def _optimizer_entries(state_dict: Any) -> dict[str, Any]:
    """Map the checkpoint key of each optimizer entry in a sharded state dict to its global shape.

    The shape is None if it is not known, or if it may differ from the stored one.
    """
    mapping = importlib.import_module("megatron.core.dist_checkpointing.mapping")
    utils = importlib.import_module("megatron.core.dist_checkpointing.dict_utils")
    entries: dict[str, Any] = {}
    for entry in utils.nested_values(state_dict):
        if isinstance(entry, mapping.ShardedTensorFactory):
            # The halves of a gated fc1 are stored along a new or a split axis: the shape varies.
            entries[entry.key] = None
        elif isinstance(entry, mapping.ShardedTensor):
            entries[entry.key] = None if entry.allow_shape_mismatch else entry.global_shape
        elif isinstance(entry, mapping.ShardedObject):
            entries[entry.unique_key] = None
    return {key: shape for key, shape in entries.items() if _OPTIMIZER_PREFIX in key}


def _stored_entries(directory: str | Path) -> dict[str, tuple[int, ...] | None]:
    """Read the keys of a torch_dist checkpoint and their global shapes from its ``.metadata`` file.

    Megatron's own `load_tensors_metadata` fails with torch 2.15, whose tensor properties have a
    field that `torch.empty` does not accept (core/dist_checkpointing/strategies/torch.py:1022,
    0.19.2).

    Args:
        directory: The iteration's directory.

    Returns:
        Checkpoint key -> global shape in elements, or None for an object that is not a tensor.
    """
    return {
        key: tuple(entry.size) if hasattr(entry, "size") else None
        for key, entry in _stored_metadata(directory).items()
    }


def _stored_dtypes(directory: str | Path) -> dict[str, torch.dtype]:
    """Read the dtype of each tensor of a torch_dist checkpoint from its ``.metadata`` file."""
    return {
        key: entry.properties.dtype
        for key, entry in _stored_metadata(directory).items()
        if hasattr(entry, "properties")
    }


def _stored_metadata(directory: str | Path) -> Mapping[str, Any]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    entries: Mapping[str, Any] = FileSystemReader(directory).read_metadata().state_dict_metadata
    return entries


def no_optimizer_state(where: Any) -> CheckpointError:
    """Make the error for a checkpoint without the moments that the policy keeps."""
    return CheckpointError(
        f"the checkpoint in {where} holds no optimizer state (a release checkpoint, or written "
        "with --no-save-optim), but the policy keeps the moments. Pass --no-load-optim to start "
        "with a new optimizer"
    )
