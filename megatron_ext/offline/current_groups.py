"""Derive the param_groups of a run from the checkpoint and the arguments. Pure.

Only the model knows which parameters are in which group. These groups are therefore assumed: they
are the checkpoint's groups with the arguments' values. A dry run (``--selective-dry-run``) shows
the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..host.schedule import ScheduleValues, scheduled

#: Bounds of a group -> Megatron's arguments, its own and that of embedding and output layer.
_BOUNDS = {"max_lr": ("lr", "decoupled_lr"), "min_lr": ("min_lr", "decoupled_min_lr")}


@dataclass(frozen=True)
class CurrentGroups:
    """The assumed current param_groups.

    Args:
        optimizers: For each optimizer of the chain its groups, without ``params`` and ``step``.
        notes: Limits of the assumption, for the user.
    """

    optimizers: tuple[tuple[Mapping[str, Any], ...], ...]
    notes: tuple[str, ...] = ()


def current_groups(
    saved: Sequence[Sequence[Mapping[str, Any]]],
    before: Any,
    now: Any,
    values: ScheduleValues | None,
) -> CurrentGroups:
    """Put the arguments' values into the checkpoint's groups, as `_get_param_groups` does.

    See core/optimizer/__init__.py:105 and :299, 0.19.2.

    Args:
        saved: For each optimizer of the chain the checkpoint's groups.
        before: The arguments of the checkpoint's run.
        now: The arguments of this run.
        values: The scheduler's values from `now`. If they are None, ``lr`` and ``weight_decay``
            stay the checkpoint's.

    Raises:
        PlanError: Megatron's scheduler does not accept the values.
    """
    notes = []
    foreign: dict[str, set[Any]] = {}
    optimizers = []
    for groups in saved:
        changed = [_changed(dict(group), before, now, foreign) for group in groups]
        if values is not None and changed:
            # The scheduler, built before the checkpoint is loaded, sets them in each group.
            (first,) = scheduled(values, changed, [0])
            for group, (lr, weight_decay) in zip(changed, first, strict=True):
                group["lr"], group["weight_decay"] = lr, weight_decay
        optimizers.append(tuple(changed))
    for key, found in foreign.items():
        notes.append(
            f"{key} {', '.join(map(str, sorted(found)))} of some param_groups does not follow from "
            "an argument (a model's own overrides): assumed to be unchanged"
        )
    new = getattr(now, "decoupled_lr", None)
    if new is not None and getattr(before, "decoupled_lr", None) is None:
        notes.append(
            f"--decoupled-lr {new:g} is new: embedding and output layer get a param_group that the "
            "checkpoint does not have and that is not shown here"
        )
    return CurrentGroups(tuple(optimizers), tuple(notes))


def _changed(
    group: dict[str, Any], before: Any, now: Any, foreign: dict[str, set[Any]]
) -> dict[str, Any]:
    width = bool(getattr(now, "use_mup", False))
    for key, names in _BOUNDS.items():
        if group.get(key) is None:
            continue
        value, found = _bound(group, key, names, before, now, width)
        group[key] = value
        if not found:
            foreign.setdefault(key, set()).add(value)
    if group.get("betas") is not None and None not in (now.adam_beta1, now.adam_beta2):
        group["betas"] = (now.adam_beta1, now.adam_beta2)
    if group.get("eps") is not None and now.adam_eps is not None:
        old, new = before.adam_eps, now.adam_eps
        scaled = width and old and group["eps"] != old
        group["eps"] = group["eps"] / old * new if scaled else new
    return group


def _bound(
    group: Mapping[str, Any],
    key: str,
    names: tuple[str, str],
    before: Any,
    now: Any,
    width: bool,
) -> tuple[Any, bool]:
    """Return a bound of a group now, and whether an argument determines it."""
    value = group[key]
    pairs = [(getattr(before, name, None), getattr(now, name, None)) for name in names]
    (old, new), (old_decoupled, new_decoupled) = pairs
    own = group.get("default_config") is False or bool(group.get("is_decoupled_lr"))
    if old_decoupled is not None and value == old_decoupled and (own or value != old):
        return (new if new_decoupled is None else new_decoupled), True
    if value == old and new is not None:
        return new, True
    if width and old and new is not None:
        return value / old * new, True
    return value, old == new
