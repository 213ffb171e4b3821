"""Find every problem of a resume that can be found before a model is built.

The checks use the arguments and the checkpoint's metadata. They read no tensor and need no process
group. The arguments are checked on every rank; the checkpoint is opened on rank 0 only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.directories import Directories, choose, is_remote
from ..checkpoint.stored import StoredCheckpoint
from ..errors import CheckpointError, HostError, MegatronExtError
from ..host import arguments, classes
from ..host.arguments import refused_flags
from ..policy.counters import ramp_of
from ..policy.from_flags import request_from_args
from ..policy.policy import ResumePolicy
from ..policy.request import DEFAULT_CLASS, Request
from .preflight_checkpoint import Found, examine_checkpoint
from .preflight_schedule import argument_problems


@dataclass(frozen=True)
class Preflight:
    """What was found before a model is built.

    Args:
        of_arguments: Everything that is wrong with the arguments: the same on every rank.
        of_checkpoint: Everything that is wrong with the checkpoint.
        found: The checkpoint that is to be loaded, and whether a phase begins with it; None where
            it was not opened, or is none.
    """

    of_arguments: tuple[MegatronExtError, ...]
    of_checkpoint: tuple[MegatronExtError, ...] = ()
    found: Found | None = None

    @property
    def errors(self) -> tuple[MegatronExtError, ...]:
        """Everything that is wrong."""
        return (*self.of_arguments, *self.of_checkpoint)

    @property
    def error(self) -> MegatronExtError | None:
        """A single finding as it is, several as one `HostError`, None where nothing is wrong."""
        if len(self.errors) < 2:
            return next(iter(self.errors), None)
        listing = "\n".join(f"  {n}. {e}" for n, e in enumerate(self.errors, 1))
        return HostError(f"{len(self.errors)} things are wrong with this resume:\n{listing}")


def examine(
    args: Any,
    stored: StoredCheckpoint | None = None,
    *,
    read_request: Callable[[Any], Request] = request_from_args,
    open_checkpoint: bool = True,
) -> Preflight:
    """Find everything that is wrong with a resume.

    Args:
        args: Megatron's arguments as parsed, before its own validation.
        stored: The checkpoint, if a plan has read it already. The import of this package's own
            optimizer class is then not tried.
        read_request: Reads the request from the arguments.
        open_checkpoint: False: look at the arguments only.
    """
    found: list[MegatronExtError] = []

    def attempt(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except MegatronExtError as e:
            found.append(e)
            return None

    request = attempt(lambda: read_request(args))
    if stored is None or args.optimizer_class != DEFAULT_CLASS:
        attempt(lambda: classes.resolve_class(args.optimizer_class))
    # These two flags can be read even if the policy cannot.
    policy = ResumePolicy(
        reset_iteration=bool(getattr(args, "reset_iteration", False)),
        reset_dataloader=bool(getattr(args, "reset_dataloader", False)),
    )
    if request is not None:
        policy = request.policy
    found += map(HostError, refused_flags(args))
    chosen = attempt(lambda: _directories(args))
    found += map(HostError, _counter_conflicts(args, policy))
    found += map(HostError, argument_problems(args))
    if chosen is None:
        return Preflight(tuple(found))
    found += map(HostError, _directory_conflicts(args, chosen, policy))
    if not open_checkpoint:
        return Preflight(tuple(found))
    known = request is not None
    try:
        wrong, checkpoint = examine_checkpoint(args, policy, chosen, stored, known=known)
    except Exception as e:  # rank 0 is alone here: the others would wait for it
        wrong, checkpoint = (_unforeseen(chosen, e),), None
    return Preflight(tuple(found), wrong, checkpoint)


def _unforeseen(chosen: Directories, e: Exception) -> CheckpointError:
    error = CheckpointError(
        f"the checkpoint in {chosen.load} cannot be examined: {type(e).__name__}: {e}. A file is "
        "damaged, or this is a fault of megatron_ext: run python -X dev -m megatron_ext verify on "
        "it, and report what that prints if nothing is damaged"
    )
    error.__cause__ = e
    return error


def _directory_conflicts(args: Any, chosen: Directories, policy: ResumePolicy) -> Iterator[str]:
    dropped = arguments.dropping_flag(args)
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
    dropped = arguments.dropping_flag(args)
    if dropped and policy.needs_optimizer:
        yield str(arguments.needs_optimizer(dropped, policy))
    if not resets:
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
