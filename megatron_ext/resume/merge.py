"""Apply a `ResumePlan` to a saved state dict, so that Megatron's own loader accepts it.

Stock loaders pair groups by a tuple that contains the hyperparameters
(`param_group_identifier_keys`, core/optimizer/optimizer.py), and two groups with the same tuple
overwrite each other. The merged dict therefore has groups that pair with the live ones by
construction. The planned values are written into the live groups afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..checkpoint.state import optimizer_section, read_optimizer
from ..errors import CheckpointError
from ..plan.decisions import ResumePlan
from ..plan.groups import match_groups

#: Keys of a live param_group that a merge does not write. The phase's mark is not among them, as it
#: is in `megatron_ext.checkpoint.state.NOT_HYPERPARAMETERS`: a merge writes it.
_KEPT_IN_GROUP = ("params", "step")


def merge_distributed(
    plan: ResumePlan,
    state_dict: Mapping[str, Any],
    live_groups: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Replace the saved groups of a DistributedOptimizer state dict.

    Args:
        plan: The plan of the resume.
        state_dict: The saved state dict. It is not modified, and its tensors are not copied.
        live_groups: The optimizer's current param_groups.

    Returns:
        A state dict whose param_groups are the live groups, without params, with the planned step.
    """
    key, section = optimizer_section(state_dict)
    groups = [{**hyperparameters(group), **_step(plan)} for group in live_groups]
    return _with_groups(state_dict, key, section, groups)


def merge_replicated(
    plan: ResumePlan,
    state_dict: Mapping[str, Any],
    live_groups: Sequence[Mapping[str, Any]],
    live_ids: Sequence[Sequence[int]],
    *,
    ids_are_live: bool,
) -> dict[str, Any]:
    """Replace the saved groups of a Float16Optimizer or FP32Optimizer state dict.

    Args:
        plan: The plan of the resume.
        state_dict: The saved state dict. It is not modified, and its tensors are not copied.
        live_groups: The optimizer's current param_groups.
        live_ids: For each live group, the integer ids of its parameters in the torch state dict.
        ids_are_live: Whether the saved ``state`` is keyed by the live ids (torch_dist, which
            matches parameters by name) or by the ids of the saved groups (legacy torch).

    Returns:
        A state dict with one group per live group, in their order.

    Raises:
        CheckpointError: Parameters are known only by position, and the groups do not correspond.
    """
    key, section = optimizer_section(state_dict)
    if ids_are_live:
        order: list[int] = list(range(len(live_groups)))
        ids = [list(i) for i in live_ids]
    else:
        order = _saved_order(state_dict, live_groups, live_ids)
        ids = [list(section["param_groups"][i]["params"]) for i in order]
    step = _step(plan) if any("step" in g for g in section["param_groups"]) else {}
    groups = [
        {**hyperparameters(group), **step, "params": group_ids}
        for group, group_ids in zip(live_groups, ids, strict=True)
    ]
    merged = _with_groups(state_dict, key, section, groups)
    for name in ("fp32_from_fp16_params", "fp32_from_fp16"):
        if name in merged:
            merged[name] = [merged[name][i] for i in order]
    return merged


def write_groups(
    values: Sequence[Mapping[str, Any]], live_groups: Sequence[dict[str, Any]]
) -> None:
    """Give the live groups exactly these hyperparameters; ``params`` and ``step`` do not change.

    Args:
        values: For each group, its new keys and values.
        live_groups: The optimizer's param_groups. They are modified in place.
    """
    for wanted, group in zip(values, live_groups, strict=True):
        for key in [k for k in group if k not in wanted and k not in _KEPT_IN_GROUP]:
            del group[key]
        group.update(wanted)


def hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a param_group without its parameters and its step."""
    return {k: v for k, v in group.items() if k not in _KEPT_IN_GROUP}


def _step(plan: ResumePlan) -> dict[str, int]:
    return {} if plan.step is None else {"step": plan.step}


def _with_groups(
    state_dict: Mapping[str, Any],
    key: str | None,
    section: Mapping[str, Any],
    groups: list[dict[str, Any]],
) -> dict[str, Any]:
    merged = {**section, "param_groups": groups}
    state = section.get("state")
    if isinstance(state, Mapping):
        # Stock loaders move `common_step` from here into each parameter's entry.
        merged["state"] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in state.items()}
    return merged if key is None else {**state_dict, key: merged}


def _saved_order(
    state_dict: Mapping[str, Any],
    live_groups: Sequence[Mapping[str, Any]],
    live_ids: Sequence[Sequence[int]],
) -> list[int]:
    """Find, for each live group, the position of the saved group with the same parameters."""
    _, section = optimizer_section(state_dict)
    sizes = [len(g["params"]) for g in section["param_groups"]]
    saved_groups = read_optimizer(state_dict).groups
    live_sizes = [len(ids) for ids in live_ids]
    pairs = match_groups(saved_groups, live_groups, sizes, live_sizes)
    order = [i for i in pairs if i is not None]
    fits = len(saved_groups) == len(live_groups) == len(order) and all(
        sizes[i] == n for i, n in zip(order, live_sizes, strict=True)
    )
    if not fits:
        raise CheckpointError(
            "a legacy torch checkpoint of a non-distributed optimizer knows its parameters only by "
            f"their position in the param_groups: saved groups hold {sizes} parameters, the "
            f"current ones {live_sizes}, and they cannot be paired. Resume with "
            "the groups the checkpoint was written with, or save it with --ckpt-format torch_dist"
        )
    return order
