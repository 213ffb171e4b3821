"""The command-line flags with which stock Megatron resumes from an edited checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.stored import StoredCheckpoint

#: Stock asserts that these values of the scheduler are those of its own arguments
#: (OptimizerParamScheduler._check_and_set, core/optimizer_param_scheduler.py:318, 0.18.2 and
#: 0.19.2; :312, 0.16.1). The flag takes the arguments' instead.
OVERRIDE = "--override-opt_param-scheduler"


@dataclass(frozen=True)
class FittingFlags:
    """What to put on the command line of a stock run.

    Args:
        flags: The flags and their values.
        inexpressible: Values of the scheduler that no flag gives, so that stock's assertion about
            them fails; `flags` then ends with `OVERRIDE`.
        several: Rates in which param_groups differ that have one flag in stock.
    """

    flags: tuple[str, ...]
    inexpressible: tuple[str, ...]
    several: tuple[str, ...]


def fitting_flags(stored: StoredCheckpoint) -> FittingFlags:
    """Find the flags that give the values of a checkpoint's param_groups and scheduler.

    Args:
        stored: The checkpoint.
    """
    groups = [group for one in stored.optimizers for group in one.groups]
    state = stored.scheduler or {}
    # Megatron 0.16 to 0.19 name the groups with --lr's schedule (core/optimizer/__init__.py:406).
    usual = [g for g in groups if g.get("default_config", True)] or groups
    others = [g for g in groups if not g.get("default_config", True)]
    found: list[tuple[str, Any]] = []
    if usual:
        found += _rates(usual[0], "")
        if stored.args.get("decoupled_lr") is not None and others:
            found += _rates(others[0], "decoupled-")
        found += _adam(usual[0])
    wrong = [
        key for key in ("max_lr", "min_lr") if usual and state.get(key) != usual[0].get(key)
    ] * bool(state)
    found += _decay(state)
    for key, flag, value in _lengths(state, stored.args):
        if value is None:
            wrong.append(key)
        else:
            found.append((flag, value))
    words = [str(word) for flag, value in found for word in (f"--{flag}", value)]
    several = [k for k in ("max_lr", "min_lr") if len({g.get(k) for g in usual}) > 1]
    return FittingFlags(tuple(words + [OVERRIDE] * bool(wrong)), tuple(wrong), tuple(several))


def _rates(group: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, flag in (("max_lr", "lr"), ("min_lr", "min-lr")):
        if group.get(key) is not None:
            yield prefix + flag, group[key]


def _adam(group: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if group.get("betas") is not None:
        yield from zip(("adam-beta1", "adam-beta2"), group["betas"], strict=True)
    if group.get("eps") is not None:
        yield "adam-eps", group["eps"]


def _decay(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    start, end, style = (state.get(k) for k in ("start_wd", "end_wd", "wd_incr_style"))
    if style not in (None, "constant"):
        yield from (
            ("weight-decay-incr-style", style),
            ("start-weight-decay", start),
            ("end-weight-decay", end),
        )
    elif start is not None:
        yield "weight-decay", start


def _lengths(
    state: Mapping[str, Any], args: Mapping[str, Any]
) -> Iterator[tuple[str, str, int | float | str | None]]:
    """Yield key, flag and value of the schedule's lengths; None if no flag gives it.

    The scheduler counts samples. It is built in get_optimizer_param_scheduler
    (training/training.py:1906, 0.19.2).
    """
    by_iterations = args.get("train_iters") or not args.get("train_samples")
    unit, size = ("iters", args.get("global_batch_size")) if by_iterations else ("samples", 1)
    if by_iterations and size:
        yield "global_batch_size", "global-batch-size", size

    def length(key: str) -> int | None:
        steps = state[key]
        if not isinstance(size, int) or size <= 0 or steps % size:
            return None
        return int(steps) // size

    if "lr_decay_style" in state:
        yield "lr_decay_style", "lr-decay-style", state["lr_decay_style"]
    if "lr_decay_steps" in state:
        yield "lr_decay_steps", f"lr-decay-{unit}", length("lr_decay_steps")
    if "lr_warmup_steps" in state:
        steps, whole = state["lr_warmup_steps"], state.get("lr_decay_steps")
        if args.get("lr_warmup_fraction") is not None and whole:
            share = steps / whole
            given = share if share * whole == steps else None
            yield "lr_warmup_steps", "lr-warmup-fraction", given
        else:
            yield "lr_warmup_steps", f"lr-warmup-{unit}", length("lr_warmup_steps")
    if "wd_incr_steps" in state:
        yield "wd_incr_steps", f"train-{unit}", length("wd_incr_steps")
