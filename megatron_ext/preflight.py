"""Everything that can be known to be wrong before a model is built, found at once.

From the arguments and the checkpoint's metadata alone: no tensor is read, no process group needed.
The launcher calls it on every rank; all of them see the same files and stop with the same error.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import host
from .arguments import request_from_args
from .checkpoint import unreadable_sharding
from .counters import ramp_of
from .directories import NON_PERSISTENT, Directories, choose, is_remote, name_of, newest
from .errors import CheckpointError, HostError, MegatronExtError
from .phase import Mark, Phase, decide, identity, same_checkpoint
from .policy import ResumePolicy
from .stored import StoredCheckpoint

#: Saved argument -> its flag; the layouts that only a fully reshardable checkpoint may change.
_MODEL_PARALLEL = {
    "tensor_model_parallel_size": "--tensor-model-parallel-size",
    "pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "expert_model_parallel_size": "--expert-model-parallel-size",
}


def check(args: Any) -> None:
    """Raise one error that lists everything found.

    Args:
        args: Megatron's arguments as parsed, before its own validation.

    Raises:
        MegatronExtError: What was found; a single finding as it is, several as one `HostError`.
    """
    errors = list(findings(args))
    if len(errors) == 1:
        raise errors[0]
    if errors:
        listing = "\n".join(f"  {n}. {e}" for n, e in enumerate(errors, 1))
        raise HostError(f"{len(errors)} things are wrong with this resume:\n{listing}")


def findings(args: Any, stored: StoredCheckpoint | None = None) -> Iterator[MegatronExtError]:
    """Everything that is wrong with a resume, one by one.

    Args:
        args: As for `check`.
        stored: The checkpoint that is loaded, for a plan that has read it already; of a run with
            this package's own class then, whose import is not tried.
    """
    found: list[MegatronExtError] = []

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except MegatronExtError as e:
            found.append(e)
            return None

    request = attempt(lambda: request_from_args(args))
    if stored is None or args.optimizer_class != host.DEFAULT_CLASS:
        attempt(lambda: host.resolve_class(args.optimizer_class))
    # Of a policy that cannot be read these two flags can.
    policy = ResumePolicy(
        reset_iteration=bool(getattr(args, "reset_iteration", False)),
        reset_dataloader=bool(getattr(args, "reset_dataloader", False)),
    )
    if request is not None:
        policy = request.policy
    found += map(HostError, refused_flags(args))
    chosen = attempt(lambda: _directories(args))
    found += map(HostError, _counter_conflicts(args, policy))
    if chosen is not None:
        found += map(HostError, _directory_conflicts(args, chosen, policy))
        known = request is not None
        found += _checkpoint_findings(args, policy, chosen, stored, known=known)
    yield from found


def _checkpoint_findings(
    args: Any,
    policy: ResumePolicy,
    chosen: Directories,
    stored: StoredCheckpoint | None,
    *,
    known: bool,
) -> Iterator[MegatronExtError]:
    """What is wrong with the checkpoint, for this run; without `known` whatever its policy."""
    if host.dropping_flag(args) or is_remote(args.load):
        return  # nothing is taken from it, or only Megatron can open it
    if stored is None and chosen.load is not None:
        try:
            # Megatron takes --ckpt-step 0 for none (training/checkpointing.py:1664, 0.19.2).
            step = getattr(args, "ckpt_step", None) or None
            stored = newest(chosen.load, step, _non_persistent(args, chosen.load))
        except CheckpointError as e:
            yield e
            return
    if stored is None:
        yield from map(CheckpointError, _nothing_to_start_from(args, chosen, policy))
        return
    facts = _Facts(args, policy, chosen, stored)
    yield from map(CheckpointError, _stored_problems(facts))
    if not known:
        return
    try:
        phase = _phase(facts)
        if phase is not None:
            _check_save_directory(facts, phase)
            _check_length(facts, phase)
    except MegatronExtError as e:
        yield e


def _non_persistent(args: Any, load: Path) -> Path | None:
    """Where Megatron looks for non-persistent checkpoints, if it does."""
    if getattr(args, "non_persistent_ckpt_type", None) != "global":
        return None
    named = getattr(args, "non_persistent_global_ckpt_dir", None)
    return Path(named) if named else load / NON_PERSISTENT


def _directory_conflicts(args: Any, chosen: Directories, policy: ResumePolicy) -> Iterator[str]:
    dropped = host.dropping_flag(args)
    if dropped and chosen.start is not None and not policy.needs_optimizer:
        yield (
            f"{dropped} with --selective-from {chosen.start}: a phase starts with the checkpoint's "
            f"optimizer, which {dropped} drops. Leave one of the two out"
        )
    if chosen.save is None or is_remote(args.save):
        return
    there = next((p for p in (chosen.save, *chosen.save.parents) if p.exists()), None)
    if there is not None and not there.is_dir():
        yield (
            f"--save {chosen.save}: {there} is a file; expected a directory, or a place where one "
            "can be made. Name another one"
        )


@dataclass(frozen=True)
class _Facts:
    """What the checks look at."""

    args: Any
    policy: ResumePolicy
    chosen: Directories
    stored: StoredCheckpoint


def refused_flags(args: Any) -> list[str]:
    """What of Megatron's own flags cannot go with ``--optimizer-class``, with the reason."""
    optimizer = getattr(args, "optimizer", "adam")
    reasons = {
        f"--optimizer {optimizer}": optimizer in ("sgd", "lion")
        and "only Adam is supported (its state is exp_avg and exp_avg_sq), and chains with it",
        "--use-megatron-fsdp": getattr(args, "use_megatron_fsdp", False)
        and "Megatron-FSDP does not load through DistributedOptimizer",
        "--use-torch-fsdp2": getattr(args, "use_torch_fsdp2", False)
        and "torch FSDP2 does not load through the optimizer's load_state_dict",
        "--non-persistent-ckpt-type local": getattr(args, "non_persistent_ckpt_type", None)
        == "local"
        and "a local checkpoint takes precedence over --load and is not tested with a selective "
        "resume. Use --non-persistent-ckpt-type global, or none for the first resume",
    }
    return [
        f"--optimizer-class {args.optimizer_class} with {flag}: {reason}"
        for flag, reason in reasons.items()
        if reason
    ]


def _directories(args: Any) -> Directories:
    start = getattr(args, "selective_from", None)
    where = getattr(args, "selective_where", None)
    if start is None or where is None:
        elsewhere = getattr(args, "non_persistent_global_ckpt_dir", None)
        return choose(args.load, args.save, start, elsewhere)
    save = None if args.save is None else Path(args.save)
    return Directories(Path(args.load), save, where, Path(start))


def _counter_conflicts(args: Any, policy: ResumePolicy) -> Iterator[str]:
    resets = [
        flag
        for flag, asked in (
            ("--reset-iteration", policy.reset_iteration),
            ("--reset-dataloader", policy.reset_dataloader),
        )
        if asked
    ]
    both = " and ".join(resets)
    dropped = host.dropping_flag(args)
    if dropped and policy.needs_optimizer:
        yield str(host.needs_optimizer(dropped, policy))
    if not resets:
        yield from _schedule_conflicts(args)
        return
    if getattr(args, "override_ckpt_iteration", None) is not None:
        yield (
            f"{both} with --override-ckpt-iteration {args.override_ckpt_iteration}: both set the "
            "iteration and the data position. Leave one of them out"
        )
    if getattr(args, "phase_transition_iterations", None):
        yield (
            f"{both} with --phase-transition-iterations: Megatron then takes the data position "
            "from the iteration. Leave one of them out"
        )
    ramp = ramp_of(args)
    if ramp is not None and len(resets) == 1:
        yield (
            f"{both} with --{ramp.replace('_', '-')}: the batch size follows the data position and "
            "the last iteration is counted from 0, so the two have to be reset together, or "
            "neither. Add the other flag, or leave the ramp out"
        )
    if policy.reset_dataloader and getattr(args, "dataloader_type", None) == "external":
        yield (
            "--reset-dataloader with --dataloader-type external: the script places its own data "
            "loader. Reset it there"
        )
    yield from _schedule_conflicts(args)


def _schedule_conflicts(args: Any) -> Iterator[str]:
    """Stock asserts it without a word (core/optimizer_param_scheduler.py:135, 0.19.2)."""
    for unit in ("iters", "samples"):
        warmup = getattr(args, f"lr_warmup_{unit}", 0) or 0
        decay = getattr(args, f"lr_decay_{unit}", None) or getattr(args, f"train_{unit}", None)
        if decay is not None and warmup and warmup >= decay:
            yield (
                f"--lr-warmup-{unit} {warmup} is not shorter than the decay of {decay} {unit} "
                f"(--lr-decay-{unit}, or --train-{unit}): the schedule would end before its "
                "warm-up does. Make the decay longer or the warm-up shorter"
            )

    fraction = getattr(args, "lr_warmup_fraction", None)
    if fraction is not None and fraction >= 1.0:
        yield (
            f"--lr-warmup-fraction {fraction:g}: the warm-up is not shorter than the decay; "
            "expected a number below 1"
        )


def _stored_problems(facts: _Facts) -> Iterator[str]:
    """What the checkpoint cannot give to this run."""
    stored, args = facts.stored, facts.args
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
            "have different layouts. Give the flag as it was"
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
            f"{', '.join(changed)}: a checkpoint of the kind {kind} cannot be loaded into another "
            f"layout ({stored.directory}). Resume once as it was saved, save with --ckpt-format "
            "torch_dist --dist-ckpt-optim-fully-reshardable, and change the layout then"
        )


def padded_rows(saved: Mapping[str, Any], args: Any) -> tuple[int, int] | None:
    """Rows of the embedding in the checkpoint and now, where the arguments are enough to tell.

    As vocab_size_with_padding rounds them up (core/tokenizers/utils/build_tokenizer.py:124,
    0.19.2); a tokenizer may add one token for the end of a document.
    """
    before, now = saved.get("padded_vocab_size"), getattr(args, "padded_vocab_size", None)
    if before is None:
        return None
    # Other tokenizers bring a vocabulary of their own.
    named = str(getattr(args, "tokenizer_type", None)).startswith("Null")
    if now is None and named and getattr(args, "vocab_size", None) is not None:
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        padded = {-(-(args.vocab_size + more) // multiple) * multiple for more in (0, 1)}
        now = padded.pop() if len(padded) == 1 else None
    return None if now is None else (int(before), int(now))


def _phase(facts: _Facts) -> Phase | None:
    stored = facts.stored
    if not stored.optimizers:
        return None
    saved = stored.optimizers[0]
    source = identity_of(stored)
    mark = None if saved.mark is None else Mark.parse(saved.mark)
    phase = decide(facts.policy, mark, source, facts.chosen.where)
    if facts.chosen.where == "own" and mark is not None and facts.chosen.start is not None:
        _check_start(mark, facts.chosen.start, stored)
        _check_start_step(facts, mark, stored)
    return phase


def identity_of(stored: StoredCheckpoint) -> str:
    """What tells a checkpoint with optimizer state from others (`megatron_ext.phase.identity`)."""
    saved = stored.optimizers[0]
    return identity(name_of(stored.root), stored.iteration, stored.args, saved.groups, saved.step)


def _check_start(mark: Mark, start: Path, own: StoredCheckpoint) -> None:
    """Raise if the phase in its own directory began at another checkpoint than is named now."""
    name, _, begun = mark.source.rpartition("@")
    iteration = begun.partition("#")[0]
    found = None
    # It may have been deleted since: then the name has to do.
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


def _check_start_step(facts: _Facts, mark: Mark, own: StoredCheckpoint) -> None:
    """Raise if --ckpt-step was meant to go back within the phase, not to say where it starts."""
    step = getattr(facts.args, "selective_start_step", None)
    begun = mark.source.rpartition("@")[2].partition("#")[0]
    if step and str(step) != begun:
        raise CheckpointError(
            f"--ckpt-step {step} with --selective-from {facts.chosen.start}: it says at which "
            f"iteration the phase starts, and the one in {own.root} was started at iteration "
            f"{begun}. To go back within the phase leave --selective-from out: --load {own.root} "
            f"--save {own.root} --ckpt-step {step}"
        )


def _check_length(facts: _Facts, phase: Phase) -> None:
    """Raise if a phase that begins here would have nothing to train; a finished one may restart."""
    last = getattr(facts.args, "train_iters", None)
    first = 0 if facts.policy.reset_iteration else facts.stored.iteration
    if phase.state == "applied" and last and last <= first:
        raise HostError(
            f"--train-iters {last}: the phase begins at iteration {first}, so there is nothing "
            "left to train; expected the last iteration, not a number of more. Raise it, or add "
            "--reset-iteration"
        )


def _check_save_directory(facts: _Facts, phase: Phase) -> None:
    """Raise if a phase that begins here would overwrite other checkpoints."""
    save, load = facts.chosen.save, facts.chosen.load
    if phase.state != "applied" or save is None:
        return
    there = newest(save, non_persistent=save / NON_PERSISTENT)
    if there is None:
        return
    if facts.policy.operations and _same_phase(there, phase):
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
    if elsewhere and not facts.policy.reset_iteration and there.iteration > facts.stored.iteration:
        raise HostError(
            f"--load {load} with --save {save}: that directory holds checkpoints up to iteration "
            f"{there.iteration} of another phase, and a phase that begins at iteration "
            f"{facts.stored.iteration} would overwrite them. Name an empty --save directory"
        )
    if facts.policy.reset_iteration:
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
