"""Run Megatron's learning rate and weight decay schedule without an optimizer."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any

from ..errors import PlanError
from ..policy.policy import ResumePolicy

#: The scheduler's values in a checkpoint, besides its position.
SCHEDULER_VALUES = (
    "max_lr",
    "min_lr",
    "lr_warmup_steps",
    "lr_decay_steps",
    "lr_decay_style",
    "start_wd",
    "end_wd",
    "wd_incr_steps",
    "wd_incr_style",
)
#: Values that a checkpoint does not have. They always come from the arguments.
NOT_SAVED = ("init_lr", "wsd_decay_steps", "lr_wsd_decay_style")


def saved_values(policy: ResumePolicy) -> frozenset[str]:
    """Return the names of the scheduler's values that come from the checkpoint."""
    if policy.schedule == "checkpoint":
        return frozenset(SCHEDULER_VALUES)
    return frozenset(policy.kept_scheduler_attributes)


@dataclass(frozen=True)
class ScheduleValues:
    """Arguments of `OptimizerParamScheduler` (core/optimizer_param_scheduler.py:110, 0.19.2).

    Positions and lengths are in samples, the unit in which Megatron's scheduler counts.

    Args:
        max_lr: Largest learning rate, for groups without their own.
        min_lr: Smallest learning rate, for groups without their own.
        lr_decay_steps: Position at which the decay ends.
        lr_warmup_steps: Position at which the warm-up ends.
        lr_decay_style: ``cosine``, ``linear``, ``WSD`` and so on.
        init_lr: Learning rate at the start of the warm-up. A checkpoint does not have it.
        start_wd: Weight decay at the start.
        end_wd: Weight decay at the end.
        wd_incr_steps: Position at which the weight decay is `end_wd`.
        wd_incr_style: ``constant``, ``linear`` or ``cosine``.
        wsd_decay_steps: Length of the final decay of WSD.
        lr_wsd_decay_style: Form of the final decay of WSD.
    """

    max_lr: float
    min_lr: float
    lr_decay_steps: int
    lr_warmup_steps: float = 0
    lr_decay_style: str = "linear"
    init_lr: float = 0.0
    start_wd: float = 0.01
    end_wd: float = 0.01
    wd_incr_steps: int = 1
    wd_incr_style: str = "constant"
    wsd_decay_steps: int | None = None
    lr_wsd_decay_style: str | None = None


def scheduled(
    values: ScheduleValues, groups: Sequence[Mapping[str, Any]], positions: Sequence[int]
) -> list[list[tuple[float, float]]]:
    """Compute the learning rate and weight decay of param_groups with Megatron's own scheduler.

    Args:
        values: The scheduler's arguments.
        groups: The param_groups. As in a run, their own bounds (max_lr, min_lr, start_wd, end_wd,
            wd_mult) take precedence over the scheduler's. They are not modified.
        positions: Positions in samples, ascending, at least 0.

    Returns:
        For each position the learning rate and the weight decay of every group.

    Raises:
        PlanError: Megatron's scheduler does not accept the values.
    """
    cls = _scheduler_class()
    live = [dict(group) for group in groups]
    out = []
    try:
        scheduler = _construct(cls, live, values)
        for position in positions:
            scheduler.step(position - scheduler.num_steps)
            out.append([(float(g["lr"]), float(g["weight_decay"])) for g in live])
    except Exception as e:  # it asserts or raises a plain Exception for values it does not accept
        raise PlanError(
            f"Megatron's scheduler does not accept these values: {_quoted(e)} ({values}). Expected "
            "min_lr <= max_lr, a warm-up shorter than the decay, start_wd <= end_wd, equal if "
            "weight decay is constant, and known styles"
        ) from e
    return out


def refusal(values: ScheduleValues) -> str | None:
    """Quote what Megatron's scheduler raises where a run constructs it; None if it accepts.

    Args:
        values: The values of the arguments.
    """
    cls = _scheduler_class()
    try:
        _construct(cls, [{}], values)
    except Exception as e:  # as in `scheduled`
        return _quoted(e)
    return None


def _scheduler_class() -> Any:
    module = importlib.import_module("megatron.core.optimizer_param_scheduler")
    return module.OptimizerParamScheduler


def _construct(cls: Any, groups: Sequence[dict[str, Any]], values: ScheduleValues) -> Any:
    return cls(
        SimpleNamespace(param_groups=groups),
        **asdict(values),
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )


def _quoted(error: Exception) -> str:
    """Quote an error, with the line of Megatron if it is an assertion without a message."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {str(error) or (frames[-1].line if frames else '')}"


def values_of(args: Any) -> ScheduleValues:
    """Compute the scheduler's arguments as Megatron's `get_optimizer_param_scheduler` does.

    The source is training/training.py:1906, after `validate_args` (training/arguments.py:1353,
    0.19.2).

    Args:
        args: Megatron's arguments. ``lr``, ``global_batch_size`` and one of ``train_iters`` and
            ``train_samples`` are set.

    Raises:
        PlanError: One of these is not set.
    """
    unit, size = ("iters", args.global_batch_size) if args.train_iters else ("samples", 1)
    length = getattr(args, f"train_{unit}")
    if not length or not size or args.lr is None:
        raise PlanError(
            "learning rate, length of the run or global batch size are not known: neither the "
            "arguments nor the checkpoint's have them. Give --lr, --train-iters (or "
            "--train-samples) and --global-batch-size"
        )

    def steps(name: str) -> int | None:
        found = getattr(args, f"{name}_{unit}", None)
        return None if found is None else found * size

    named = steps("lr_decay")
    decay = length * size if named is None else named
    fraction = getattr(args, "lr_warmup_fraction", None)
    constant = args.weight_decay_incr_style == "constant"
    start, end = args.start_weight_decay, args.end_weight_decay
    return ScheduleValues(
        max_lr=float(args.lr),
        min_lr=args.min_lr,
        lr_decay_steps=decay,
        lr_warmup_steps=fraction * decay if fraction is not None else steps("lr_warmup") or 0,
        lr_decay_style=args.lr_decay_style,
        init_lr=args.lr_warmup_init,
        start_wd=args.weight_decay if constant or start is None else start,
        end_wd=args.weight_decay if constant or end is None else end,
        wd_incr_steps=length * size,
        wd_incr_style=args.weight_decay_incr_style,
        wsd_decay_steps=steps("lr_wsd_decay"),
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )


def with_saved(
    values: ScheduleValues, state: Mapping[str, Any], names: Iterable[str] = SCHEDULER_VALUES
) -> ScheduleValues:
    """Replace some values by those of a checkpoint's scheduler state.

    Args:
        values: The values of the arguments.
        state: `OptimizerParamScheduler.state_dict`. Values that it does not have are not replaced.
        names: The names of the values to replace.
    """
    return replace(values, **{name: state[name] for name in names if name in state})


def resumed(
    policy: ResumePolicy, values: ScheduleValues, state: Mapping[str, Any]
) -> ScheduleValues:
    """Compute the scheduler's values after a load, as `hooks.scheduling.load_scheduler` sets them.

    Args:
        policy: The user's policy.
        values: The values of the arguments.
        state: The checkpoint's scheduler state.
    """
    return with_saved(values, state, saved_values(policy))
