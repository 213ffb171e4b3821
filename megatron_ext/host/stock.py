"""What unmodified Megatron does with a checkpoint and arguments, by version.

Lines are of megatron-core 0.19.2. `tests/test_plan_stock.py` holds this against Megatron itself,
for every version of the matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from packaging.version import Version

from ..checkpoint import NOT_HYPERPARAMETERS
from .contract import TESTED
from .schedule import ScheduleValues, scheduled, with_saved

#: By what a saved param_group is paired with a current one (``param_group_identifier_keys``,
#: core/optimizer/optimizer.py:151). With 0.19.0 the bounds of a group came in (#4705), so that a
#: group with another max_lr is another group.
_IDENTIFIERS = {
    Version("0.19"): (
        "end_wd",
        "max_lr",
        "min_lr",
        "optimizer",
        "start_wd",
        "wd_mult",
        "lr_mult",
        "is_expert_parallel",
        "is_decoupled_lr",
    ),
    Version("0.0"): ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr"),
}

#: Values of the scheduler's state in the order in which they are checked, and what the messages
#: call them (`OptimizerParamScheduler.load_state_dict`, core/optimizer_param_scheduler.py:341).
_CHECKED = {
    "max_lr": "learning rate",
    "min_lr": "minimum learning rate",
    "lr_warmup_steps": "warmup iterations",
    "lr_decay_steps": "total number of iterations",
    "lr_decay_style": "learning rate decay style",
    "start_wd": "start weight decay",
    "end_wd": "end weight decay",
    "wd_incr_steps": "total number of weight decay iterations",
    "wd_incr_style": "weight decay incr style",
}

#: Values that are there before the scheduler takes its first step; the weight decay's come after
#: it (core/optimizer_param_scheduler.py:392, Megatron-LM #7468).
_BEFORE_THE_STEP = tuple(name for name in _CHECKED if "wd" not in name)

#: The scheduler writes them before every step, from the group's bounds.
_SCHEDULED = ("lr", "weight_decay")

#: A key that torch's AdamW has in a param_group, and TE's and apex's FusedAdam do not.
_TORCH_ADAM = "amsgrad"


@dataclass(frozen=True)
class Case:
    """What stock Megatron's load depends on.

    Args:
        saved: For each optimizer of the chain the checkpoint's param_groups.
        current: For each the current ones.
        distributed: Whether the optimizer is a DistributedOptimizer.
        whole_parameters: Whether its state is stored by whole parameters (``fully_reshardable``).
        fp32: Whether the weights are fp32; None where that is not known.
        values: The arguments' scheduler values.
        state: The checkpoint's scheduler state, empty where there is none.
        override: ``--override-opt_param-scheduler``.
        use_checkpoint: ``--use-checkpoint-opt_param-scheduler``.
        dropped: The flag with which the optimizer's state is not loaded, if one is given.
    """

    saved: Sequence[Sequence[Mapping[str, Any]]]
    current: Sequence[Sequence[Mapping[str, Any]]]
    distributed: bool
    values: ScheduleValues
    state: Mapping[str, Any] = field(default_factory=dict)
    whole_parameters: bool = False
    fp32: bool | None = None
    override: bool = False
    use_checkpoint: bool = False
    dropped: str | None = None


@dataclass(frozen=True)
class StockGroup:
    """What becomes of one current param_group.

    Args:
        optimizer: Number of its optimizer in the chain.
        group: Its position.
        outcome: ``loads``: with the arguments' values; ``keeps``: with old values, without a word;
            ``missing``: the checkpoint has no group of this identifier; ``lost``: not loaded.
        identifier: By what it is looked for.
        kept: Key -> the checkpoint's value, which stays in force, and the argument.
    """

    optimizer: int
    group: int
    outcome: Literal["loads", "keeps", "missing", "lost"]
    identifier: tuple[Any, ...]
    kept: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class FirstStep:
    """What the first step after the load uses for one param_group."""

    optimizer: int
    group: int
    lr: float
    weight_decay: float


@dataclass(frozen=True)
class Stock:
    """What stock Megatron does.

    Args:
        version: Of megatron-core.
        tested: Whether the tests run against this version or one beside it.
        outcome: ``loads``: as the arguments say; ``keeps``: trains with old values; ``fails``: does
            not start; ``drops``: trains without the moments.
        error: The exception, where it fails.
        groups: Every current param_group.
        scheduler: What its scheduler does, in one sentence.
        first_step: One for each param_group; empty where it fails.
        source: Where upstream does that.
    """

    version: str
    tested: bool
    outcome: Literal["loads", "keeps", "fails", "drops"]
    error: str | None
    groups: tuple[StockGroup, ...]
    scheduler: str
    first_step: tuple[FirstStep, ...]
    source: str


def stock(version: str, case: Case) -> Stock:
    """Say what an unmodified Megatron does.

    Args:
        version: Of megatron-core.
        case: The checkpoint and the arguments.

    Raises:
        PlanError: Its scheduler does not accept the values.
    """
    keys = identifier_keys(version)
    groups = tuple(
        _group(case, keys, number, index, group)
        for number, current in enumerate(case.current)
        for index, group in enumerate(current)
    )
    scheduler, values, refused = _scheduler(case)
    if case.dropped:
        # Neither is the scheduler's state, so that the schedule starts again.
        first = _first_step(case.current, case.values, 0)
        source = "training/checkpointing.py:2555"
        error, outcome = None, "drops"
    else:
        found = _optimizer_error(case, groups, version)
        error, source = found or (refused, "core/optimizer_param_scheduler.py:323")
        first = ()
        if error is None:
            source = "core/optimizer/distrib_optimizer.py:969" if case.distributed else _REPLICATED
            merged = _loaded(case, keys)
            first = _first_step(merged, values, int(case.state.get("num_steps") or 0))
        keeps = any(g.outcome == "keeps" for g in groups)
        outcome = "fails" if error is not None else "keeps" if keeps else "loads"
    return Stock(
        version=version,
        tested=_tested(version),
        outcome=outcome,  # type: ignore[arg-type]
        error=error,
        groups=groups,
        scheduler=scheduler,
        first_step=first,
        source=source,
    )


def identifier_keys(version: str) -> tuple[str, ...]:
    """By which keys a version pairs saved param_groups with current ones."""
    found = Version(Version(version).public)
    return next(keys for since, keys in _IDENTIFIERS.items() if found >= since)


def identifier(keys: Sequence[str], group: Mapping[str, Any]) -> tuple[Any, ...]:
    """A group's identifier; NeMo's aliases count (core/optimizer/distrib_optimizer.py:943)."""
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in keys)


_REPLICATED = "core/optimizer/optimizer.py:594"


def _tested(version: str) -> bool:
    found = Version(version)
    return Version(TESTED[0]) <= found and found.release[:2] <= Version(TESTED[-1]).release[:2]


def _by_identifier(
    keys: Sequence[str], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Of groups with the same identifier the last one wins, as upstream."""
    return {repr(identifier(keys, group)): group for group in groups}


def _group(
    case: Case, keys: Sequence[str], number: int, index: int, group: Mapping[str, Any]
) -> StockGroup:
    mine = identifier(keys, group)
    if case.dropped:
        return StockGroup(number, index, "lost", mine)
    saved = _by_identifier(keys, case.saved[number] if number < len(case.saved) else ())
    found = saved.get(repr(mine))
    if found is None:
        return StockGroup(number, index, "missing", mine)
    kept = {
        key: (found[key], value)
        for key, value in group.items()
        if key in found
        and key not in (*_SCHEDULED, *NOT_HYPERPARAMETERS)
        and not _same(found[key], value)
    }
    return StockGroup(number, index, "keeps" if kept else "loads", mine, kept)


def _loaded(case: Case, keys: Sequence[str]) -> list[list[Mapping[str, Any]]]:
    """The groups as they are after the load: everything of the saved ones."""
    out = []
    for saved, current in zip(case.saved, case.current, strict=True):
        by_key = _by_identifier(keys, saved)
        out.append([by_key[repr(identifier(keys, group))] for group in current])
    return out


def _optimizer_error(
    case: Case, groups: Sequence[StockGroup], version: str
) -> tuple[str, str] | None:
    """The exception of the optimizers' load and where it is raised; None where they load."""
    if case.distributed and any(_TORCH_ADAM in g for groups in case.saved for g in groups):
        said = (
            "AssertionError: a new DistributedOptimizer over torch's AdamW has no step, and its "
            "state_dict asserts one"
        )
        return said, "core/optimizer/distrib_optimizer.py:833"
    missing = next((g for g in groups if g.outcome == "missing"), None)
    if missing is not None and case.distributed:
        return f"KeyError: {missing.identifier}", "core/optimizer/distrib_optimizer.py:969"
    if missing is not None:
        said = f"ValueError: Could not find parameter group with key {missing.identifier}"
        return f"{said} in loaded checkpoint.", _REPLICATED
    if case.distributed and case.fp32 and not case.whole_parameters:
        said = (
            "RuntimeError: a view of a leaf Variable that requires grad is being used in an "
            "in-place operation."
        )
        return said, "core/optimizer/distrib_optimizer.py:1225"
    return None


def _scheduler(case: Case) -> tuple[str, ScheduleValues, str | None]:
    """What is said of it, its values at the first step, and the exception where it refuses."""
    values = case.values
    if case.override and case.use_checkpoint:
        said = "both override and use-checkpoint are set."
        return "refuses both flags", values, f"AssertionError: {said}"
    if case.dropped:
        return "is not loaded: the schedule starts at 0 again", values, None
    differing = {
        name: (getattr(values, name), case.state[name])
        for name in _CHECKED
        if name in case.state and getattr(values, name) != case.state[name]
    }
    if not differing:
        return "loads: its values are those of the checkpoint", values, None
    names = ", ".join(differing)
    if case.override:
        said = f"takes {names} from the arguments; a param_group's own max_lr and min_lr win"
        return said, values, None
    if case.use_checkpoint:
        said = f"takes {names} from the checkpoint, weight decay from the second step on"
        return said, with_saved(values, case.state, _BEFORE_THE_STEP), None
    name, (argument, saved) = next(iter(differing.items()))
    error = (
        f"AssertionError: OptimizerParamScheduler: class input value {argument} and checkpoint"
        f"value {saved} for {_CHECKED[name]} do not match"
    )
    said = f"refuses other values of {names} without --override-opt_param-scheduler"
    return said, values, error


def _first_step(
    optimizers: Sequence[Sequence[Mapping[str, Any]]], values: ScheduleValues, position: int
) -> tuple[FirstStep, ...]:
    places = [(n, i, g) for n, groups in enumerate(optimizers) for i, g in enumerate(groups)]
    (found,) = scheduled(values, [group for _, _, group in places], [position])
    return tuple(
        FirstStep(number, index, *at) for (number, index, _), at in zip(places, found, strict=True)
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return list(a) == list(b)
    return bool(a == b)
