"""Set the counters of a phase at a load, before Megatron reads them.

Stock Megatron keeps one counter in three places and corrects them from each other. This module does
not change a run whose counters agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..base import ranks
from ..base.log import say
from ..checkpoint.directories import name_of
from ..checkpoint.state import read_optimizer
from ..errors import CheckpointError, MegatronExtError
from ..host.arguments import global_args
from ..policy.batch_size import batch_size_at
from ..policy.counters import Counters, begin, last_iteration, overridden, ramp_of
from ..policy.phase import Mark, Phase, decide, identity
from ..policy.policy import ResumePolicy
from ..report.schema import LengthDocument
from ..resume.session import Resume, current


def before_the_load(resume: Resume, load_dir: Any, args: Any, state_dict: Any) -> None:
    """Decide the phase and set the counters in a state dict, before Megatron reads them.

    The state dict is the result of ``_load_base_checkpoint`` (training/checkpointing.py:1633,
    0.19.2). It has the iteration, the saved arguments with the consumed samples, and the
    optimizer's groups. The function is collective over the default process group: one `agree`.

    Args:
        resume: The resume of the optimizers that will be loaded.
        load_dir: The checkpoint's directory.
        args: Megatron's arguments, as the load got them.
        state_dict: The state dict. Its consumed samples are modified in place. None if there is no
            checkpoint.

    Raises:
        MegatronExtError: The policy does not fit the checkpoint; on every rank.
    """
    decided, error = None, None
    try:
        decided = _decide(resume, load_dir, args, state_dict)
    except MegatronExtError as e:
        error = e
    phase = None if decided is None else decided[0]
    text = "" if phase is None else f"{phase.state}, {phase.mark}"
    ranks.agree_on("the phase", {"phase": text}, error)
    if decided is None:
        return
    phase, mark, before, after = decided
    resume.announce(phase, mark, before, after)
    saved = state_dict.get("args")
    if saved is not None:
        for name in _OF_ARGUMENTS:
            setattr(saved, name, getattr(after, name))


def after_the_load(resume: Resume, args: Any) -> int | None:
    """Set the last iteration of a sample-based run whose batch size has changed.

    Args:
        resume: The resume of the loaded optimizers.
        args: Megatron's arguments, with the counters of the checkpoint; None where they are not
            set.

    Returns:
        The iteration at which the run continues; None if no checkpoint was loaded.
    """
    if resume.counters is None or resume.phase is None:
        return None
    last = _last_iteration(resume, args)
    before = getattr(args, "train_iters", None)
    if last is not None and last != before:
        say(
            f"megatron_ext: {args.train_samples} training samples are reached at iteration {last}, "
            f"not {before}: the global batch size has changed since"
        )
        args.train_iters = last
    return resume.counters[1].iteration


def length_of_run(resume: Resume, args: Any) -> LengthDocument:
    """Return the last iteration and the batch sizes for the report; called before `after_the_load`.

    Args:
        resume: The resume of the loaded optimizers.
        args: Megatron's arguments, or None without its training loop.
    """
    sizes = (None, None) if resume.load is None else resume.load.batch_sizes or (None, None)
    constant = args is not None and ramp_of(args) is None
    return {
        "train_iters": None if args is None else _last_iteration(resume, args),
        "global_batch_size": {
            "checkpoint": sizes[0],
            "value": getattr(args, "global_batch_size", None) if constant else None,
        },
    }


def _last_iteration(resume: Resume, args: Any) -> int | None:
    """Compute the iteration at which stock would end the run with correct counters."""
    samples, size = (getattr(args, n, None) for n in ("train_samples", "global_batch_size"))
    if not samples or not size or resume.counters is None or ramp_of(args) is not None:
        return getattr(args, "train_iters", None)
    mark = None if resume.phase is None else resume.phase.mark
    offset = 0 if mark is None else mark.offset
    return last_iteration(resume.counters[1], offset, samples, size)


def batch_sizes(saved: Any, at: tuple[Counters, Counters]) -> tuple[int, int] | None:
    """Return the global batch sizes of the checkpoint's run and of this one, each at its position.

    Args:
        saved: The checkpoint's arguments.
        at: The counters of the checkpoint and after the load.

    Returns:
        Sizes in samples; None if one is not known.
    """
    args = global_args()
    if args is None:
        return None
    before = batch_size_at(vars(saved), at[0].consumed_train_samples)
    now = batch_size_at(vars(args), at[1].consumed_train_samples)
    return None if before is None or now is None else (before, now)


_OF_ARGUMENTS = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")


def _decide(
    resume: Resume, load_dir: Any, args: Any, state_dict: Any
) -> tuple[Phase, str | None, Counters, Counters] | None:
    policy = resume.policy
    if state_dict is None:
        if policy.operations or resume.where != "load":
            raise CheckpointError(
                f"{', '.join(policy.operations) or '--selective-from'}: a phase begins from a "
                f"checkpoint, and there is none in {load_dir}. Name the directory of the earlier "
                "phase"
            )
        return None
    section = _first_optimizer(state_dict.get("optimizer"))
    if section is None:
        return None  # `hooks.loading.load_checkpoint` raises the error
    saved = read_optimizer(section)
    arguments = state_dict.get("args")
    iteration = int(state_dict.get("iteration") or 0)
    source = identity(
        name_of(load_dir),
        iteration,
        {} if arguments is None else vars(arguments),
        saved.groups,
        saved.step,
    )
    mark = None if saved.mark is None else Mark.parse(saved.mark)
    phase = _decided_before(policy, saved.mark, source)
    if phase is None:
        phase = decide(policy, mark, source, resume.where)
    before = _counters(iteration, arguments, state_dict)
    offset = 0 if mark is None else mark.offset
    after, offset = begin(phase.policy, before, offset)
    # Stock applies its flag after this function, and would not tell the report.
    after, offset = overridden(after, offset, args)
    return phase.at(offset), saved.mark, before, after


def _decided_before(policy: ResumePolicy, mark: str | None, source: str) -> Phase | None:
    """Return the preflight's phase if it was decided for this checkpoint and this policy."""
    found = None if current.preflight is None else current.preflight.found
    if found is None or found.phase is None or found.mark != mark:
        return None
    phase = found.phase
    return phase if (phase.source, phase.asked) == (source, policy) else None


def _first_optimizer(section: Any) -> Mapping[str, Any] | None:
    """Find the state of a chain's first optimizer in the nesting of torch_dist or legacy torch."""
    if isinstance(section, list):
        section = section[0] if section else None
    if isinstance(section, Mapping) and section and all(isinstance(k, int) for k in section):
        section = section[min(section)]
    return section if isinstance(section, Mapping) and section else None


def _counters(iteration: int, arguments: Any, state_dict: Mapping[str, Any]) -> Counters:
    scheduler = state_dict.get("opt_param_scheduler") or state_dict.get("lr_scheduler") or {}
    position = scheduler.get("num_steps")
    return Counters(
        iteration,
        **{name: int(getattr(arguments, name, 0) or 0) for name in _OF_ARGUMENTS},
        num_steps=None if position is None else int(position),
    )
