"""Check the checkpoint of a resume before a model is built."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.directories import (
    NON_PERSISTENT,
    Directories,
    is_remote,
    newest,
    require_tracked,
)
from ..checkpoint.state import unreadable_sharding
from ..checkpoint.stored import StoredCheckpoint
from ..errors import CheckpointError, HostError, MegatronExtError
from ..host import arguments, formats
from ..policy.phase import Phase
from ..policy.policy import ResumePolicy
from .preflight_parameters import check_parameters, check_rules, is_by_position
from .preflight_phase import ResumeContext, check_length, check_save_directory, phase_of
from .preflight_schedule import schedule_problems

#: Saved argument -> its flag, for the parallel sizes that only a fully reshardable checkpoint may
#: change.
_MODEL_PARALLEL = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "expert_model_parallel_size": "--expert-model-parallel-size",
}
#: How a checkpoint that stores state by position becomes one that names it.
_WAY_OUT = (
    "convert a dp_reshardable checkpoint (python -m megatron_ext convert SOURCE TARGET --to "
    "fully_reshardable), or resume once as it was saved, save with --ckpt-format torch_dist "
    "--dist-ckpt-optim-fully-reshardable"
)


@dataclass(frozen=True)
class Found:
    """The checkpoint that a run is to load.

    Args:
        directory: The iteration's own.
        phase: Whether a phase begins or goes on; None without optimizer state, or where it cannot
            be decided.
        mark: The saved mark that it was decided from.
    """

    directory: Path
    phase: Phase | None = None
    mark: str | None = None


def examine_checkpoint(
    args: Any,
    policy: ResumePolicy,
    chosen: Directories,
    stored: StoredCheckpoint | None,
    *,
    known: bool,
) -> tuple[tuple[MegatronExtError, ...], Found | None]:
    """Find what is wrong with the checkpoint, for this run.

    Args:
        args: Megatron's arguments as parsed.
        policy: The user's policy.
        chosen: The directories of the run.
        stored: The checkpoint, if it has been read already.
        known: Whether the policy could be read. If not, checks that depend on it are skipped.
    """
    planned = stored is not None  # a plan knows the rules' parameters itself
    if is_remote(args.load):
        return (), None  # only Megatron can open it
    # Megatron ignores --ckpt-step 0 (training/checkpointing.py:1664, 0.19.2).
    step = getattr(args, "ckpt_step", None) or None
    if stored is None and chosen.load is not None and chosen.where != "own" and step is None:
        try:
            require_tracked(chosen.load, "--selective-from" if chosen.start else "--load")
        except CheckpointError as e:
            return (e,), None
    if arguments.dropping_flag(args):
        # Nothing of the optimizer is taken from it, but Megatron has to open it.
        return _openable(stored), None
    if stored is None and chosen.load is not None:
        try:
            stored = newest(chosen.load, step, _non_persistent(args, chosen.load))
            if stored is not None and stored.store is not None:
                stored.store.require_files()
        except CheckpointError as e:
            return (e,), None
    if stored is None:
        return tuple(map(CheckpointError, _nothing_to_start_from(args, chosen, policy))), None
    if unopenable := _openable(stored):
        return unopenable, None
    context = ResumeContext(args, policy, chosen, stored)
    wrong: list[MegatronExtError] = [CheckpointError(p) for p in _stored_problems(context)]
    found = Found(stored.directory)
    if not known:
        return tuple(wrong), found
    wrong += map(HostError, schedule_problems(context))
    try:
        phase = phase_of(context)
        if phase is not None:
            found = Found(stored.directory, phase, stored.optimizers[0].mark)
            check_save_directory(context, phase)
            check_parameters(stored, phase.policy.parameters)
            wrong += () if planned else check_rules(stored, phase.policy)
            check_length(context, phase)
    except MegatronExtError as e:
        wrong.append(e)
    return tuple(wrong), found


def _openable(stored: StoredCheckpoint | None) -> tuple[MegatronExtError, ...]:
    store = None if stored is None else stored.store
    if stored is None or store is None or not store.common_in_store:
        return ()
    reason = formats.cannot_open(stored.directory)
    return () if reason is None else (CheckpointError(reason),)


def _non_persistent(args: Any, load: Path) -> Path | None:
    """Return the directory of non-persistent checkpoints, if Megatron looks for them."""
    if getattr(args, "non_persistent_ckpt_type", None) != "global":
        return None
    named = getattr(args, "non_persistent_global_ckpt_dir", None)
    return Path(named) if named else load / NON_PERSISTENT


def _stored_problems(context: ResumeContext) -> Iterator[str]:
    """Yield the reasons why this run cannot use the checkpoint."""
    stored, args = context.stored, context.args
    if not stored.optimizers:
        yield (
            f"the checkpoint in {stored.directory} holds no optimizer state (a release checkpoint, "
            "or written with --no-save-optim), but the policy keeps the moments. Pass "
            "--no-load-optim to start with a new optimizer"
        )
        return
    if getattr(args, "no_save_optim", False) and stored.format != "torch":
        yield (
            f"--no-save-optim with a {stored.format} checkpoint to load: Megatron then does not "
            "request the optimizer's state from it either (training/checkpointing.py:1338, "
            "0.19.2), and the load fails. Leave the flag out"
        )
    if reason := unreadable_sharding(stored.sharding_type):
        yield f"{stored.directory}: {reason}"
    saved_kind = bool(stored.args.get("use_distributed_optimizer", False))
    changed = stored.args and saved_kind != bool(args.use_distributed_optimizer)
    layer_wise = arguments.is_layer_wise(argparse.Namespace(**stored.args))
    if stored.args and layer_wise != arguments.is_layer_wise(args):
        names = {True: "with", False: "without"}
        yield (
            f"the checkpoint in {stored.directory} was written with --optimizer "
            f"{stored.args.get('optimizer')} {names[layer_wise]} Megatron's layer-wise distributed "
            f"optimizer (--use-distributed-optimizer, or dist_muon), and this run is "
            f"{names[not layer_wise]} it: their states are arranged in different ways. Give "
            "--optimizer and --use-distributed-optimizer as they were"
        )
    elif changed and not layer_wise and is_by_position(stored):
        names = {True: "with", False: "without"}
        yield (
            f"the checkpoint in {stored.directory} was written {names[saved_kind]} "
            f"--use-distributed-optimizer and this run is {names[not saved_kind]} it: their states "
            f"have different forms in a {stored.sharding_type or stored.format} checkpoint. Give "
            f"the flag as it was, or {_WAY_OUT}, and then change it"
        )
    yield from _override_problems(stored, args)
    yield from _layout_problems(stored, args)


def _override_problems(stored: StoredCheckpoint, args: Any) -> Iterator[str]:
    """Check what stock raises after the load (training/checkpointing.py:2445, 0.19.2)."""
    target = getattr(args, "override_ckpt_iteration", None)
    saved, now = stored.args.get("global_batch_size"), getattr(args, "global_batch_size", None)
    if target is not None and saved and now and saved != now:
        yield (
            f"--override-ckpt-iteration {target} with --global-batch-size {now}: the checkpoint's "
            f"is {saved}, and Megatron computes the data position from the iteration and the "
            "current batch size, so that it would be wrong. Leave one of the two out"
        )


def _layout_problems(stored: StoredCheckpoint, args: Any) -> Iterator[str]:
    changed = []
    taken = getattr(args, "use_checkpoint_args", False)
    sizes_taken = taken and getattr(args, "use_mp_args_from_checkpoint_args", False)
    for name, flag in {} if sizes_taken else _MODEL_PARALLEL.items():
        saved, current = stored.args.get(name), getattr(args, name, None)
        if saved is not None and current is not None and saved != current:
            changed.append(f"{flag} {saved} -> {current}")
    kind = stored.sharding_type or stored.format
    rows = None if taken else padded_rows(stored.args, args)
    if rows is not None and rows[0] != rows[1]:
        changed.append(f"padded vocabulary {rows[0]} -> {rows[1]}")
    if changed and is_by_position(stored):
        yield (
            f"{', '.join(changed)}: a {kind} checkpoint cannot be loaded into another parallel "
            f"layout ({stored.directory}). Load a copy: {_WAY_OUT}, and then change the layout"
        )


def padded_rows(saved: Mapping[str, Any], args: Any) -> tuple[int, int] | None:
    """Return the rows of the embedding in the checkpoint and now, if the arguments determine them.

    vocab_size_with_padding rounds them up (core/tokenizers/utils/build_tokenizer.py:124, 0.19.2).
    A tokenizer may add one token for the end of a document.
    """
    before, now = saved.get("padded_vocab_size"), getattr(args, "padded_vocab_size", None)
    if before is None:
        return None
    # Other tokenizers have their own vocabulary size.
    named = str(getattr(args, "tokenizer_type", None)).startswith("Null")
    if now is None and named and getattr(args, "vocab_size", None) is not None:
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        padded = {-(-(args.vocab_size + more) // multiple) * multiple for more in (0, 1)}
        now = padded.pop() if len(padded) == 1 else None
    return None if now is None else (int(before), int(now))


def _nothing_to_start_from(args: Any, chosen: Directories, policy: ResumePolicy) -> Iterator[str]:
    asked = ", ".join(policy.operations)
    pretrained = getattr(args, "pretrained_checkpoint", None)
    if chosen.where == "start":
        yield (
            f"--selective-from {chosen.start}: there is no checkpoint (no "
            "latest_checkpointed_iteration.txt). Name the --save directory of the earlier phase"
        )
    elif chosen.where == "own":
        yield (
            f"--load {chosen.load} holds non-persistent checkpoints only. Give "
            "--non-persistent-ckpt-type global to go on from them, or name an empty directory"
        )
    elif pretrained is not None and policy.needs_optimizer:
        yield (
            f"--pretrained-checkpoint {pretrained} with {asked or 'a policy for its optimizer'}: "
            "Megatron loads it without its optimizer, which this needs. Name it in "
            "--selective-from instead, or leave this out to start from its weights alone"
        )
    elif asked:
        where = f"--load {chosen.load} holds no checkpoint" if chosen.load else "there is no --load"
        yield (
            f"{asked}: {where} to begin the phase from. Name the earlier phase's directory in "
            "--selective-from, with its optimizer"
        )
