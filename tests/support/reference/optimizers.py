"""The optimizers whose state is known, and what presets mean for them."""

from __future__ import annotations

from megatron_ext.errors import PlanError
from megatron_ext.host.optimizers import TABLE, Moment, OptimizerState
from megatron_ext.plan.fitting import fitted_preset, has_no_effect
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import CATALOGUE, Preset

from .markdown import table, words

_STEPS = {"group": "in each param_group", "state": "in each parameter's state", None: "none"}


def optimizers() -> str:
    """From the table, and from the functions that fit a preset to a row."""
    rows = [
        (
            row.name,
            ", ".join(row.classes),
            "; ".join(map(_moment, row.moments)),
            _STEPS[row.step],
            ", ".join(row.hyperparameters),
            _presets(row),
        )
        for row in TABLE
    ]
    head = ("optimizer", "classes", "moments", "steps", "hyperparameters", "presets")
    return table(head, [[words(cell) for cell in row] for row in rows])


def _moment(one: Moment) -> str:
    kind = "average" if one.average else "sum"
    what = {1: "gradient", 2: "squared gradient"}[one.order]
    what = what if one.of_gradient else f"normalised {what}"
    key, position = one.decay
    decay = key if position is None else f"{key}[{position}]"
    return f"{one.tensor}: {kind} of the {what}, decays with {decay}"


def _presets(row: OptimizerState) -> str:
    apart = {"refused": [], "no effect": []}  # type: dict[str, list[str]]
    for name, entry in CATALOGUE.items():
        preset = Preset(name, (0.5,) * len(entry.arguments))
        if has_no_effect(preset, row):
            apart["no effect"].append(name)
            continue
        try:
            fitted_preset(ResumePolicy(preset=preset), row, "w")
        except PlanError:
            apart["refused"].append(name)
    found = [f"{what}: {', '.join(names)}" for what, names in apart.items() if names]
    return "; ".join(found) or "all"
