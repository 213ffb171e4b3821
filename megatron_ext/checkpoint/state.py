"""The optimizer's part of a checkpoint: parameter groups, step, tensor names and shapes.

No function here reads a tensor. They work on state dicts and metadata that have been read already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..base.values import plain
from ..errors import CheckpointError

#: The dtype of the weights in the key of a bucket (core/optimizer/distrib_optimizer.py:1884,
#: 0.19.2).
_DTYPE = re.compile(r"dtype_\(torch\.(\w+), torch\.\w+\)")

#: Role of a directory in a phase. Without ``--selective-from`` it is ``load``: an earlier phase's
#: directory or this one's. With it, ``start`` is where the phase starts, ``own`` its own directory.
DirectoryRole = Literal["load", "start", "own"]
#: The largest step that Adam's kernels can take: it is an int32 there.
LARGEST_STEP = 2**31 - 1
#: NeMo writes these structural keys with a prefix; Megatron accepts both
#: (`param_group_identifier_keys`, core/optimizer/optimizer.py).
_NEMO_PREFIX = "pre_"
_NEMO_KEYS = ("wd_mult", "lr_mult")
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict")
#: The key of a param_group that holds the phase's mark (`megatron_ext.policy.phase.Mark`).
MARK_KEY = "megatron_ext_phase"
#: Keys of a param_group that are no hyperparameters.
NOT_HYPERPARAMETERS = ("params", "step", MARK_KEY)
#: The sharding of a distributed optimizer's state that was the default with
#: ``--ckpt-fully-parallel-save`` up to megatron-core 0.14, and where none is named.
FLATTENED = "fully_sharded_model_space"


@dataclass(frozen=True)
class SavedOptimizer:
    """The part of a saved optimizer state dict that decisions depend on.

    Args:
        groups: The saved param_groups without `NOT_HYPERPARAMETERS`, NeMo's aliases resolved.
        step: Optimizer steps taken (the exponent of Adam's bias correction), or None if the
            checkpoint was written before the first step.
        mark: The mark of the phase it was written in, for `megatron_ext.policy.phase.Mark.parse`;
            None if no phase was ever begun.
    """

    groups: tuple[Mapping[str, Any], ...]
    step: int | None
    mark: str | None = None


def optimizer_section(state_dict: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """Find the dict with ``param_groups`` in an optimizer's state dict.

    Args:
        state_dict: The argument of a Megatron optimizer's ``load_state_dict``. DistributedOptimizer
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
        CheckpointError: There are no param_groups, ``step`` is no number of steps, or the groups
            disagree about it or about the phase.
    """
    _, section = optimizer_section(state_dict)
    _require_groups(section)
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


def _require_groups(section: Mapping[str, Any]) -> None:
    groups, state = section["param_groups"], section.get("state") or {}
    good = not isinstance(groups, Sequence) or all(  # what is none is refused where it is read
        isinstance(group, Mapping) and all(isinstance(key, str) for key in group)
        for group in groups
    )
    if not good or not isinstance(state, Mapping):
        raise CheckpointError(
            "the checkpoint's optimizer has no param_groups and state as torch writes them: "
            "expected a list of dicts whose keys are texts, and a dict. The checkpoint is damaged "
            "or was edited; load another one or pass --no-load-optim to start with a new optimizer "
            "(the Adam moments are then lost)"
        )


def unreadable_sharding(sharding_type: str | None) -> str | None:
    """Explain why the supported Megatron versions cannot read a distributed optimizer's state.

    Args:
        sharding_type: ``distrib_optim_sharding_type`` of the checkpoint.

    Returns:
        The reason and a remedy for the user, or None if the state can be read.
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


def require_readable(metadata: Mapping[str, Any] | None) -> None:
    """Raise if Megatron cannot read the checkpoint's sharding type.

    Args:
        metadata: The checkpoint's content metadata.

    All ranks raise, because they have the same metadata from the common state. If the metadata name
    no type, stock assumes the one that it cannot read (distrib_optimizer.py:1509, 0.19.2).
    """
    sharding_type = (metadata or {}).get("distrib_optim_sharding_type")
    if sharding_type is None:
        raise CheckpointError(
            "sharded_state_dict was called without metadata that names the sharding "
            f"(distrib_optim_sharding_type). Megatron then assumes the sharding {FLATTENED}, which "
            "megatron-core 0.16 and later can neither read nor write. Pass "
            "metadata=dist_checkpointing.load_content_metadata(DIRECTORY). A checkpoint of 0.15 or "
            "earlier has no metadata: convert it with python -m megatron_ext convert SOURCE TARGET"
        )
    reason = unreadable_sharding(sharding_type)
    if reason is not None:
        raise CheckpointError(f"the checkpoint cannot be resumed from: {reason}")


def misfits(
    requested: Mapping[str, Sequence[int] | None], saved: Mapping[str, Sequence[int] | None]
) -> list[str]:
    """Compare the optimizer tensors that this rank requests with those in a checkpoint.

    Args:
        requested: Checkpoint key -> requested global shape, in elements (None for a non-tensor).
        saved: Checkpoint key -> stored global shape.

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


def other_precision(
    requested: Mapping[str, object], saved: Mapping[str, object]
) -> CheckpointError | None:
    """Make the error for buckets of weights of another dtype, which their keys name.

    Args:
        requested: Checkpoint keys that this rank requests.
        saved: Checkpoint keys that are stored.

    Returns:
        None if the dtypes are not what differs.
    """
    now, before = (
        {m[1] for key in keys for m in _DTYPE.finditer(key)} for keys in (requested, saved)
    )
    if not now or not before or now & before:
        return None
    then, mine = (" and ".join(sorted(found)) for found in (before, now))
    return CheckpointError(
        f"the checkpoint's optimizer state is that of {then} weights, the model has {mine} ones. "
        "State by bucket (dp_reshardable) cannot change the precision. Resume with the precision "
        "of the checkpoint (--bf16, --fp16, or neither), or convert it (python -m megatron_ext "
        "convert SOURCE TARGET --to fully_reshardable) and resume from that in another one"
    )


def does_not_fit(lines: Sequence[str]) -> CheckpointError:
    """Make the error for shards that do not fit, from the lines of `misfits`."""
    return CheckpointError(
        "the checkpoint's optimizer state does not fit the model:\n"
        + "\n".join(f"  {line}" for line in lines[:8])
        + (f"\n  and {len(lines) - 8} more" if len(lines) > 8 else "")
        + "\nResume with the model and the tensor, pipeline and expert parallel sizes the "
        "checkpoint was saved with. To change them, convert a dp_reshardable checkpoint (python -m "
        "megatron_ext convert SOURCE TARGET --to fully_reshardable) or save it with "
        "--dist-ckpt-optim-fully-reshardable. --no-load-optim starts with a new optimizer (the "
        "Adam moments are then lost)"
    )


def canonical(group: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a saved group with NeMo's aliases resolved."""
    out = dict(group)
    for key in _NEMO_KEYS:
        if key not in out and _NEMO_PREFIX + key in out:
            out[key] = out.pop(_NEMO_PREFIX + key)
    return out


def saved_key(group: Mapping[str, Any], key: str) -> str:
    """Return the name that a key of a canonical group has in the saved group."""
    alias = _NEMO_PREFIX + key
    return alias if key in _NEMO_KEYS and key not in group and alias in group else key


def _common_step(groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> int | None:
    """Return an optimizer's one step; TE and apex keep it in the groups, torch in the state."""
    found = [g.get("step") for g in groups]
    found.append(state.get("common_step"))
    found += [s.get("step") for s in state.values() if isinstance(s, Mapping)]
    steps = {_whole_step(step) for step in found if step is not None}
    if len(steps) > 1:
        raise CheckpointError(
            f"the checkpoint's param_groups disagree about step: found {sorted(steps)}, expected "
            "one number (Megatron keeps one step per optimizer). The checkpoint is damaged or was "
            "edited; load another one or pass --no-load-optim"
        )
    return steps.pop() if steps else None


def _whole_step(found: Any) -> int:
    """Return a saved step as an int. A float of torch's Adam is one too."""
    step = plain(found)
    number = isinstance(step, int | float) and not isinstance(step, bool)
    # The comparison is false for a NaN.
    if not (number and 0 <= step <= LARGEST_STEP and step == int(step)):
        raise CheckpointError(
            f"the checkpoint's step is {step!r}; expected a whole number from 0 to {LARGEST_STEP}. "
            "The checkpoint is damaged or was edited; load another one or pass --no-load-optim to "
            "start with a new optimizer (the Adam moments are then lost)"
        )
    return int(step)


def _common_mark(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the mark of an optimizer's groups; a group that was added later has none."""
    marks = sorted({str(g[MARK_KEY]) for g in groups if g.get(MARK_KEY) is not None})
    if len(marks) > 1:
        raise CheckpointError(
            f"the checkpoint's param_groups disagree about {MARK_KEY}: found {marks}, expected one "
            "phase. The checkpoint was edited; load another one"
        )
    return marks[0] if marks else None
