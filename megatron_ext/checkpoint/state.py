"""What a checkpoint holds of the optimizer: parameter groups, step, tensor names and shapes.

Nothing here reads a tensor: the functions look at state dicts and metadata that Megatron has
already read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import CheckpointError

#: What a directory is to a phase. ``load``: it may be an earlier phase's or this one's. With
#: ``--selective-from``: ``start``: where the phase starts; ``own``: the phase's own directory.
DirectoryRole = Literal["load", "start", "own"]
#: The tensors of Adam's state; `param` is Megatron's name for the fp32 master weight.
MOMENT_KEYS = ("exp_avg", "exp_avg_sq")
#: NeMo writes these structural keys with a prefix; Megatron accepts both
#: (`param_group_identifier_keys`, core/optimizer/optimizer.py).
_NEMO_PREFIX = "pre_"
_NEMO_KEYS = ("wd_mult", "lr_mult")
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict")
#: The key of a param_group that says which phase it is in (`megatron_ext.policy.phase.Mark`).
MARK_KEY = "megatron_ext_phase"
#: What a param_group holds beside its hyperparameters.
NOT_HYPERPARAMETERS = ("params", "step", MARK_KEY)
#: The sharding of a distributed optimizer's state that was the default with
#: ``--ckpt-fully-parallel-save`` up to megatron-core 0.14, and where none is named.
FLATTENED = "fully_sharded_model_space"


@dataclass(frozen=True)
class SavedOptimizer:
    """The part of a saved optimizer state dict that decisions are made on.

    Args:
        groups: The saved param_groups without ``params``, with NeMo's aliases resolved.
        step: Optimizer steps taken (the exponent of Adam's bias correction), or None where the
            checkpoint was written before the first step.
        mark: The phase it was written in, as `megatron_ext.policy.phase.Mark.parse` reads it;
            None where no transition has been made.
    """

    groups: tuple[Mapping[str, Any], ...]
    step: int | None
    mark: str | None = None


def optimizer_section(state_dict: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """Find the dict with ``param_groups`` in an optimizer's state dict.

    Args:
        state_dict: What a Megatron optimizer's ``load_state_dict`` is given: DistributedOptimizer
            and Float16OptimizerWithFloat16Params nest the torch state dict under ``optimizer``,
            FP32Optimizer does not.

    Returns:
        The key it is nested under (None for FP32Optimizer) and the dict itself.

    Raises:
        CheckpointError: There are no param_groups.
    """
    if "param_groups" in state_dict:
        return None, state_dict
    for key in _OPTIMIZER_KEYS:
        section = state_dict.get(key)
        if isinstance(section, Mapping) and "param_groups" in section:
            return key, section
    raise CheckpointError(
        "the checkpoint holds no optimizer state: expected 'param_groups' in the optimizer's "
        f"state dict, found the keys {sorted(map(str, state_dict))}. Pass --no-load-optim to "
        "start with a new optimizer (the Adam moments are then lost)"
    )


def read_optimizer(state_dict: Mapping[str, Any]) -> SavedOptimizer:
    """Read groups and step of a saved optimizer.

    Args:
        state_dict: See `optimizer_section`.

    Raises:
        CheckpointError: There are no param_groups, or the groups disagree about ``step`` or about
            the phase.
    """
    _, section = optimizer_section(state_dict)
    groups = tuple(canonical(group) for group in section["param_groups"])
    if not groups:
        raise CheckpointError(
            "the checkpoint's optimizer has no param_groups: nothing can be resumed from it. "
            "Pass --no-load-optim to start with a new optimizer (the Adam moments are then lost)"
        )
    return SavedOptimizer(
        groups=tuple({k: v for k, v in g.items() if k not in NOT_HYPERPARAMETERS} for g in groups),
        step=_common_step(groups, section.get("state") or {}),
        mark=_common_mark(groups),
    )


def unreadable_sharding(sharding_type: str | None) -> str | None:
    """Why the supported Megatrons cannot read a distributed optimizer's state, and the way out.

    Args:
        sharding_type: ``distrib_optim_sharding_type`` of the checkpoint.

    Returns:
        A sentence for the user, or None where it can be read.
    """
    if sharding_type == FLATTENED:
        return (
            f"its optimizer state has the sharding {FLATTENED}, which megatron-core 0.16 and later "
            "can neither read nor write (flattened_range, core/dist_checkpointing/mapping.py). "
            "Convert it: python -m megatron_ext convert SOURCE TARGET, then --load TARGET"
        )
    if sharding_type == "fully_sharded_bucket_space":
        return (
            f"its optimizer state has the sharding {sharding_type}, which megatron-core 0.15 and "
            "later do not know. Load it with megatron-core 0.14 and save it with --ckpt-format "
            "torch, or pass --no-load-optim to start with a new optimizer (the Adam moments are "
            "then lost)"
        )
    return None


def misfits(
    requested: Mapping[str, Sequence[int] | None], saved: Mapping[str, Sequence[int] | None]
) -> list[str]:
    """Compare the optimizer tensors this rank asks for with those a checkpoint has.

    Args:
        requested: Checkpoint key -> global shape wanted, in elements (None for a non-tensor).
        saved: Checkpoint key -> global shape stored.

    Returns:
        One line for each key that is missing or has another shape; empty if all fit.
    """
    lines = []
    for key, shape in requested.items():
        if key not in saved:
            lines.append(f"{key}: not in the checkpoint")
            continue
        stored = saved[key]
        if shape is not None and stored is not None and list(stored) != list(shape):
            lines.append(
                f"{key}: the checkpoint has shape {tuple(stored)}, the model {tuple(shape)}"
            )
    return lines


def does_not_fit(lines: Sequence[str]) -> CheckpointError:
    """The error for shards that do not fit, from the lines of `misfits`."""
    return CheckpointError(
        "the checkpoint's optimizer state does not fit the model:\n"
        + "\n".join(f"  {line}" for line in lines[:8])
        + (f"\n  and {len(lines) - 8} more" if len(lines) > 8 else "")
        + "\nResume with the model and the tensor, pipeline and expert parallel sizes the "
        "checkpoint was saved with, save it with --dist-ckpt-optim-fully-reshardable to change "
        "them, or pass --no-load-optim to start with a new optimizer (the Adam moments are then "
        "lost)"
    )


def canonical(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group with NeMo's aliases resolved."""
    out = dict(group)
    for key in _NEMO_KEYS:
        if key not in out and _NEMO_PREFIX + key in out:
            out[key] = out.pop(_NEMO_PREFIX + key)
    return out


def saved_key(group: Mapping[str, Any], key: str) -> str:
    """The name that a key of a canonical group has in the saved one."""
    alias = _NEMO_PREFIX + key
    return alias if key in _NEMO_KEYS and key not in group and alias in group else key


def _common_step(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> int | None:
    """The one step of an optimizer; TE and apex keep it in the groups, torch in the state."""
    steps = {int(g["step"]) for g in groups if g.get("step") is not None}
    if state.get("common_step") is not None:
        steps.add(int(state["common_step"]))
    steps |= {
        int(s["step"])
        for s in state.values()
        if isinstance(s, Mapping) and s.get("step") is not None
    }
    if len(steps) > 1:
        raise CheckpointError(
            f"the checkpoint's param_groups disagree about step: found {sorted(steps)}, expected "
            "one number (Megatron keeps one step per optimizer). The checkpoint is damaged or was "
            "edited; load another one or pass --no-load-optim"
        )
    return steps.pop() if steps else None


def _common_mark(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """The phase of an optimizer; a group that was added since has none."""
    marks = sorted({str(g[MARK_KEY]) for g in groups if g.get(MARK_KEY) is not None})
    if len(marks) > 1:
        raise CheckpointError(
            f"the checkpoint's param_groups disagree about {MARK_KEY}: found {marks}, expected one "
            "phase. The checkpoint was edited; load another one"
        )
    return marks[0] if marks else None
