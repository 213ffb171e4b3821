"""Find the param_groups that a run with other arguments makes, from a checkpoint's index.

Megatron's own function makes them of the parameters that the index names. Where it names none, or
the checkpoint's groups are not those of that function, the current groups are not known. They are
then assumed to be the checkpoint's with the arguments' values, and a warning says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..errors import PlanError
from ..host.optimizers import ADAM, state_of_groups
from ..host.param_groups import MadeGroup, made_groups
from ..host.schedule import ScheduleValues, scheduled
from .stored_parameters import Stored

Groups = tuple[tuple[Mapping[str, Any], ...], ...]
#: Key of a group of Adam -> Megatron's arguments.
_OF_ADAM: dict[str, tuple[str, ...]] = {"betas": ("adam_beta1", "adam_beta2"), "eps": ("adam_eps",)}
#: The same for other optimizers (core/optimizer/optimizer_config.py, 0.19.2).
_ARGUMENTS: dict[str, dict[str, tuple[str, ...]]] = {
    "SGD": {"momentum": ("sgd_momentum",)},
    "Muon": {"momentum": ("muon_momentum",)},
    "Adaptive Muon": {
        "momentum": ("muon_momentum",),
        "beta2": ("adaptive_muon_beta2",),
        "eps": ("adaptive_muon_eps",),
    },
    "SOAP": {**_OF_ADAM, "shampoo_beta": ("soap_shampoo_beta",)},
}
_LION_BESIDE_MUON = {"Lion": {"betas": ("lion_beta1", "lion_beta2")}}
#: Bounds of a group -> Megatron's arguments, its own and that of embedding and output layer.
_BOUNDS = {"max_lr": ("lr", "decoupled_lr"), "min_lr": ("min_lr", "decoupled_min_lr")}


@dataclass(frozen=True)
class CurrentGroups:
    """The current param_groups.

    Args:
        optimizers: For each optimizer of the chain its groups, without ``params`` and ``step``.
        places: Name of a parameter -> positions of its optimizer and its group; None if the groups
            are assumed.
        unknown: Why the groups are assumed; empty if they are known.
        notes: Limits of an assumption, for the user.
    """

    optimizers: Groups
    places: Mapping[str, tuple[int, int]] | None = None
    unknown: str = ""
    notes: tuple[str, ...] = ()

    def at_first(self, values: ScheduleValues) -> CurrentGroups:
        """Copy the groups with the learning rate and weight decay of the scheduler, once built.

        Raises:
            PlanError: Megatron's scheduler does not accept the values.
        """
        out = []
        for groups in self.optimizers:
            (first,) = scheduled(values, groups, [0])
            out.append(
                tuple(
                    {**group, "lr": lr, "weight_decay": weight_decay}
                    for group, (lr, weight_decay) in zip(groups, first, strict=True)
                )
            )
        return replace(self, optimizers=tuple(out))


def current_groups(
    saved: Sequence[Sequence[Mapping[str, Any]]], found: Stored, before: Any, now: Any
) -> CurrentGroups:
    """Find the current param_groups. ``lr`` and ``weight_decay`` are not those of a scheduler yet.

    Args:
        saved: For each optimizer of the chain the checkpoint's groups.
        found: The checkpoint's parameters.
        before: The arguments of the checkpoint's run.
        now: The arguments of this run.
    """
    try:
        made = _made(saved, found, before, now)
    except PlanError as e:
        return replace(_assumed(saved, before, now), unknown=str(e))
    places = {
        name: (number, index)
        for number, groups in enumerate(made)
        for index, group in enumerate(groups)
        for name in group.names
    }
    optimizers = tuple(
        tuple(_completed(group, old[0], now) for group in groups)
        for groups, old in zip(made, saved, strict=True)
    )
    return CurrentGroups(optimizers, places)


def _made(
    saved: Sequence[Sequence[Mapping[str, Any]]], found: Stored, before: Any, now: Any
) -> tuple[tuple[MadeGroup, ...], ...]:
    """Make the groups of both runs, and compare the first with the saved ones.

    Raises:
        PlanError: The groups of this run are not known; the reason.
    """
    if not found.parameters:
        raise PlanError("the checkpoint does not name its parameters")
    if now.lr is None:
        raise PlanError("neither the arguments nor the checkpoint have a learning rate")
    parameters = [(p.name, p.shape, p.expert) for p in found.parameters]
    made = made_groups(parameters, before)
    own = [[group.values for group in groups] for groups in made]
    if list(map(_structure, own)) != list(map(_structure, saved)):
        raise PlanError(
            "the checkpoint's are not those that Megatron makes of its parameters and arguments (a "
            "script with groups of its own, frozen parameters, or arguments that are not saved)"
        )
    made = made_groups(parameters, now)
    if len(made) != len(saved):
        raise PlanError(
            f"the checkpoint has {len(saved)} optimizers, and this run makes {len(made)}: experts "
            "with and without ranks of their own"
        )
    return made


def _structure(groups: Sequence[Mapping[str, Any]]) -> Counter[tuple[Any, ...]]:
    """Count groups of each kind. What else differs are values, which a phase may have changed."""
    return Counter(
        (g.get("wd_mult", 1.0), bool(g.get("is_expert_parallel")), _has_own_rate(g)) for g in groups
    )


def _has_own_rate(group: Mapping[str, Any]) -> bool:
    return group.get("default_config") is False or bool(group.get("is_decoupled_lr"))


def _completed(made: MadeGroup, saved: Mapping[str, Any], now: Any) -> dict[str, Any]:
    """Add what the optimizer adds to a group: its defaults, as they are in a saved group."""
    out = {**saved, **_of_arguments(saved, now), **made.values}
    out["weight_decay"] = (now.weight_decay or 0.0) * made.values["wd_mult"]
    return out


def _of_arguments(saved: Mapping[str, Any], now: Any) -> dict[str, Any]:
    """Return the optimizer's values of the arguments, for the keys that a saved group has."""
    out: dict[str, Any] = {}
    row = state_of_groups([saved]) or ADAM
    # Muon's Lion is built from --lion-beta1 and 2, an --optimizer lion from Adam's betas
    # (core/optimizer/__init__.py:604 and core/optimizer/emerging_optimizers.py:456, 0.19.2).
    beside_muon = row.name == "Lion" and "muon" in str(getattr(now, "optimizer", ""))
    arguments = _LION_BESIDE_MUON if beside_muon else _ARGUMENTS
    for key, names in arguments.get(row.name, _OF_ADAM).items():
        values = tuple(getattr(now, name, None) for name in names)
        if saved.get(key) is not None and None not in values:
            out[key] = values if len(values) > 1 else values[0]
    return out


def _assumed(saved: Sequence[Sequence[Mapping[str, Any]]], before: Any, now: Any) -> CurrentGroups:
    """Put the arguments' values into the checkpoint's groups."""
    foreign: dict[str, set[Any]] = {}
    optimizers = tuple(
        tuple(_changed(dict(group), before, now, foreign) for group in groups) for groups in saved
    )
    notes = tuple(
        f"{key} {', '.join(map(str, sorted(found)))} of some param_groups does not follow from "
        "an argument (a model's own overrides): assumed to be unchanged"
        for key, found in foreign.items()
    )
    return CurrentGroups(optimizers, notes=notes)


def _changed(
    group: dict[str, Any], before: Any, now: Any, foreign: dict[str, set[Any]]
) -> dict[str, Any]:
    for key, names in _BOUNDS.items():
        if group.get(key) is None:
            continue
        value, found = _bound(group, key, names, before, now)
        group[key] = value
        if not found:
            foreign.setdefault(key, set()).add(value)
    return group | _of_arguments(group, now)


def _bound(
    group: Mapping[str, Any], key: str, names: tuple[str, str], before: Any, now: Any
) -> tuple[Any, bool]:
    """Return a bound of a group now, and whether an argument determines it."""
    value = group[key]
    pairs = [(getattr(before, name, None), getattr(now, name, None)) for name in names]
    (old, new), (old_decoupled, new_decoupled) = pairs
    own = old_decoupled is not None and value == old_decoupled
    if own and (_has_own_rate(group) or value != old):
        return (new if new_decoupled is None else new_decoupled), True
    if value == old and new is not None:
        return new, True
    return value, old == new
