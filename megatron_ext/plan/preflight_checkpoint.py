"""Check the checkpoint of a resume before a model is built."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.directories import NON_PERSISTENT, Directories, is_remote, name_of, newest
from ..checkpoint.state import unreadable_sharding
from ..checkpoint.stored import StoredCheckpoint
from ..errors import CheckpointError, HostError, MegatronExtError
from ..host import arguments
from ..policy.phase import Mark, Phase, decide, identity, same_checkpoint
from ..policy.policy import ResumePolicy

#: Saved argument -> its flag, for the parallel sizes that only a fully reshardable checkpoint may
#: change.
_MODEL_PARALLEL = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "expert_model_parallel_size": "--expert-model-parallel-size",
}


def checkpoint_findings(
    args: Any,
    policy: ResumePolicy,
    chosen: Directories,
    stored: StoredCheckpoint | None,
    *,
    known: bool,
) -> Iterator[MegatronExtError]:
    """Yield the problems of a checkpoint for this run.

    Args:
        args: Megatron's arguments.
        policy: The user's policy.
        chosen: The directories of the run.
        stored: The checkpoint, if it has been read already.
        known: Whether the policy could be read. If not, checks that depend on it are skipped.
    """
    if arguments.dropping_flag(args) or is_remote(args.load):
        return  # nothing is loaded from it, or only Megatron can open it
    if stored is None and chosen.load is not None:
        try:
            # Megatron ignores --ckpt-step 0 (training/checkpointing.py:1664, 0.19.2).
            step = getattr(args, "ckpt_step", None) or None
            stored = newest(chosen.load, step, _non_persistent(args, chosen.load))
        except CheckpointError as e:
            yield e
            return
    if stored is None:
        yield from map(CheckpointError, _nothing_to_start_from(args, chosen, policy))
        return
    context = _ResumeContext(args, policy, chosen, stored)
    yield from map(CheckpointError, _stored_problems(context))
    if not known:
        return
    try:
        phase = _phase(context)
        if phase is not None:
            _check_save_directory(context, phase)
            _check_length(context, phase)
    except MegatronExtError as e:
        yield e


def _non_persistent(args: Any, load: Path) -> Path | None:
    """Return the directory of non-persistent checkpoints, if Megatron looks for them."""
    if getattr(args, "non_persistent_ckpt_type", None) != "global":
        return None
    named = getattr(args, "non_persistent_global_ckpt_dir", None)
    return Path(named) if named else load / NON_PERSISTENT


@dataclass(frozen=True)
class _ResumeContext:
    """The inputs of the checks."""

    args: Any
    policy: ResumePolicy
    chosen: Directories
    stored: StoredCheckpoint


def _stored_problems(context: _ResumeContext) -> Iterator[str]:
    """Yield the reasons why this run cannot use the checkpoint."""
    stored, args = context.stored, context.args
    if not stored.optimizers:
        yield (
            f"the checkpoint in {stored.directory} holds no optimizer state (a release checkpoint, "
            "or written with --no-save-optim), but the moments were to be kept. Pass "
            "--no-load-optim to start with a new optimizer"
        )
        return
    if reason := unreadable_sharding(stored.sharding_type):
        yield f"{stored.directory}: {reason}"
    saved_kind = bool(stored.args.get("use_distributed_optimizer", False))
    if stored.args and saved_kind != bool(args.use_distributed_optimizer):
        names = {True: "with", False: "without"}
        yield (
            f"the checkpoint in {stored.directory} was written {names[saved_kind]} "
            f"--use-distributed-optimizer and this run is {names[not saved_kind]} it: their states "
            "have different forms. Give the flag as it was"
        )
    yield from _layout_problems(stored, args)


def _layout_problems(stored: StoredCheckpoint, args: Any) -> Iterator[str]:
    changed = []
    taken = getattr(args, "use_checkpoint_args", False)
    sizes_taken = taken and getattr(args, "use_mp_args_from_checkpoint_args", False)
    for name, flag in {} if sizes_taken else _MODEL_PARALLEL.items():
        saved, current = stored.args.get(name), getattr(args, name, None)
        if saved is not None and current is not None and saved != current:
            changed.append(f"{flag} {saved} -> {current}")
    kind = stored.sharding_type or stored.format
    fixed = stored.format == "torch" or stored.sharding_type in (
        "dp_reshardable",
        "dp_zero_gather_scatter",
    )
    rows = None if taken else padded_rows(stored.args, args)
    if rows is not None and rows[0] != rows[1]:
        changed.append(f"padded vocabulary {rows[0]} -> {rows[1]}")
    if changed and fixed:
        yield (
            f"{', '.join(changed)}: a {kind} checkpoint cannot be loaded into another parallel "
            f"layout ({stored.directory}). Resume once as it was saved, save with --ckpt-format "
            "torch_dist --dist-ckpt-optim-fully-reshardable, and then change the layout"
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


def _phase(context: _ResumeContext) -> Phase | None:
    stored = context.stored
    if not stored.optimizers:
        return None
    saved = stored.optimizers[0]
    source = identity_of(stored)
    mark = None if saved.mark is None else Mark.parse(saved.mark)
    phase = decide(context.policy, mark, source, context.chosen.where)
    if context.chosen.where == "own" and mark is not None and context.chosen.start is not None:
        _check_start(mark, context.chosen.start, stored)
        _check_start_step(context, mark, stored)
    return phase


def identity_of(stored: StoredCheckpoint) -> str:
    """Identify a stored checkpoint (`megatron_ext.policy.phase.identity`)."""
    saved = stored.optimizers[0]
    return identity(name_of(stored.root), stored.iteration, stored.args, saved.groups, saved.step)


def _check_start(mark: Mark, start: Path, own: StoredCheckpoint) -> None:
    """Raise if the phase began at another checkpoint than the one that is named now."""
    name, _, begun = mark.source.rpartition("@")
    iteration = begun.partition("#")[0]
    found = None
    # If it has been deleted since, only its name can be compared.
    with contextlib.suppress(CheckpointError, ValueError):
        found = newest(start, int(iteration))
    if found is not None and found.optimizers:
        fits, there = same_checkpoint(identity_of(found), mark.source), identity_of(found)
    else:
        fits, there = name_of(start) == name, f"no iteration {iteration} (of {name_of(start)})"
    if fits:
        return
    raise CheckpointError(
        f"--selective-from {start}: the phase in {own.root} was started from {mark.source}, and "
        f"that directory holds {there}; expected the same checkpoint. Name the one it was started "
        "from, leave --selective-from out to go on with the phase, or name an empty directory for "
        "--load and --save to begin another one"
    )


def _check_start_step(context: _ResumeContext, mark: Mark, own: StoredCheckpoint) -> None:
    """Raise if --ckpt-step is not the iteration at which the phase started."""
    step = getattr(context.args, "selective_start_step", None)
    begun = mark.source.rpartition("@")[2].partition("#")[0]
    if step and str(step) != begun:
        raise CheckpointError(
            f"--ckpt-step {step} with --selective-from {context.chosen.start}: the flag gives the "
            f"iteration at which the phase starts, but the phase in {own.root} was started at "
            f"iteration {begun}. To go back within the phase, leave --selective-from out: "
            f"--load {own.root} --save {own.root} --ckpt-step {step}"
        )


def _check_length(context: _ResumeContext, phase: Phase) -> None:
    """Raise if a phase that begins here has no iteration to train; a finished one may restart."""
    last = getattr(context.args, "train_iters", None)
    first = 0 if context.policy.reset_iteration else context.stored.iteration
    if phase.state == "applied" and last and last <= first:
        raise HostError(
            f"--train-iters {last}: the phase begins at iteration {first}, so there is nothing "
            "left to train; expected the last iteration, not the number of additional ones. Raise "
            "it, or add --reset-iteration"
        )


def _check_save_directory(context: _ResumeContext, phase: Phase) -> None:
    """Raise if a phase that begins here would overwrite other checkpoints."""
    save, load = context.chosen.save, context.chosen.load
    if phase.state != "applied" or save is None:
        return
    there = newest(save, non_persistent=save / NON_PERSISTENT)
    if there is None:
        return
    if context.policy.operations and _same_phase(there, phase):
        if save.resolve() == (load or save).resolve():
            instead = "leave --ckpt-step out; to start again, give it another --selective-phase"
        else:
            instead = (
                f"give --selective-from {load} --load {save} --save {save}; to start again, empty "
                "the directory or name another one"
            )
        raise HostError(
            f"--load {load} with --save {save}: this phase has been started from there before and "
            f"has reached iteration {there.iteration} in {save}; starting it again would overwrite "
            f"that. To go on, {instead}"
        )
    elsewhere = load is not None and save.resolve() != load.resolve()
    if (
        elsewhere
        and not context.policy.reset_iteration
        and there.iteration > context.stored.iteration
    ):
        raise HostError(
            f"--load {load} with --save {save}: that directory holds checkpoints up to iteration "
            f"{there.iteration} of another phase, and a phase that begins at iteration "
            f"{context.stored.iteration} would overwrite them. Name an empty --save directory"
        )
    if context.policy.reset_iteration:
        raise HostError(
            f"--reset-iteration with --save {save}: that directory holds checkpoints up to "
            f"iteration {there.iteration} of another phase, and counting from 0 again would "
            "overwrite them. Give the phase a --save (and --load) directory of its own and name "
            f"{load} in --selective-from"
        )


def _same_phase(there: StoredCheckpoint, phase: Phase) -> bool:
    """Whether a checkpoint was written by the phase that is about to begin."""
    mark = there.optimizers[0].mark if there.optimizers else None
    if mark is None or phase.mark is None:
        return False
    begun = Mark.parse(mark)
    same = (begun.phase, begun.operations) == (phase.mark.phase, phase.mark.operations)
    return same and same_checkpoint(begun.source, phase.mark.source)


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
    elif pretrained is not None:
        yield (
            f"--pretrained-checkpoint {pretrained}: Megatron loads it without its optimizer, whose "
            "moments were to be kept. Name it in --selective-from instead, or add --finetune to "
            "start with a new optimizer"
        )
    elif asked:
        where = f"--load {chosen.load} holds no checkpoint" if chosen.load else "there is no --load"
        yield (
            f"{asked}: {where} to begin the phase from. Name the earlier phase's directory in "
            "--selective-from, with its optimizer"
        )
