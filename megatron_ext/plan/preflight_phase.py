"""What is wrong with the phase that a run is to begin or to go on with.

Found from the checkpoint's mark and from what lies in the directories, before a model is built.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.directories import NON_PERSISTENT, Directories, name_of, newest, require_tracked
from ..checkpoint.stored import StoredCheckpoint
from ..errors import CheckpointError, HostError
from ..policy.counters import first_iteration
from ..policy.phase import Mark, Phase, decide, identity, same_checkpoint
from ..policy.policy import ResumePolicy


@dataclass(frozen=True)
class ResumeContext:
    """The inputs of the checks."""

    args: Any
    policy: ResumePolicy
    chosen: Directories
    stored: StoredCheckpoint


def phase_of(context: ResumeContext) -> Phase | None:
    """Decide whether a phase begins or goes on; None without optimizer state.

    Raises:
        CheckpointError: The phase began at another checkpoint than is named now.
        PlanError: The checkpoint belongs to another phase.
    """
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


def _check_start_step(context: ResumeContext, mark: Mark, own: StoredCheckpoint) -> None:
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


def check_length(context: ResumeContext, phase: Phase) -> None:
    """Raise if a phase that begins here has no iteration to train; a finished one may restart."""
    last = getattr(context.args, "train_iters", None)
    first = _first_iteration(context)
    if phase.state == "applied" and last and last <= first:
        raise HostError(
            f"--train-iters {last}: the phase begins at iteration {first}, so there is nothing "
            "left to train; expected the last iteration, not the number of additional ones. Raise "
            "it, or add --reset-iteration"
        )


def check_save_directory(context: ResumeContext, phase: Phase) -> None:
    """Raise if a phase that begins here would overwrite other checkpoints."""
    save, load = context.chosen.save, context.chosen.load
    if phase.state != "applied" or save is None:
        return
    there = newest(save, non_persistent=save / NON_PERSISTENT)
    if there is None:
        require_tracked(save, "--save")
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
        and there.iteration > _first_iteration(context)
    ):
        raise HostError(
            f"--load {load} with --save {save}: that directory holds checkpoints up to iteration "
            f"{there.iteration} of another phase, and a phase that begins at iteration "
            f"{_first_iteration(context)} would overwrite them. Name an empty --save directory"
        )
    if context.policy.reset_iteration:
        raise HostError(
            f"--reset-iteration with --save {save}: that directory holds checkpoints up to "
            f"iteration {there.iteration} of another phase, and counting from 0 again would "
            "overwrite them. Give the phase a --save (and --load) directory of its own and name "
            f"{load} in --selective-from"
        )


def _first_iteration(context: ResumeContext) -> int:
    reset = context.policy.reset_iteration
    return first_iteration(context.args, reset, context.stored.iteration)


def _same_phase(there: StoredCheckpoint, phase: Phase) -> bool:
    """Whether a checkpoint was written by the phase that is about to begin."""
    mark = there.optimizers[0].mark if there.optimizers else None
    if mark is None or phase.mark is None:
        return False
    begun = Mark.parse(mark)
    same = (begun.phase, begun.operations) == (phase.mark.phase, phase.mark.operations)
    return same and same_checkpoint(begun.source, phase.mark.source)
