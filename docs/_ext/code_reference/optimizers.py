"""The optimizers whose state is known, and what presets mean for them."""

from __future__ import annotations

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from . import trees


class Optimizers(SphinxDirective):
    """The table of optimizers."""

    def run(self) -> list[nodes.Node]:
        """From the table and from the functions that fit a preset to a row."""
        from megatron_ext.errors import PlanError
        from megatron_ext.host.optimizers import TABLE, Moment, OptimizerState
        from megatron_ext.plan.fitting import fitted_preset, has_no_effect
        from megatron_ext.policy.policy import ResumePolicy
        from megatron_ext.policy.presets import CATALOGUE, Preset

        def moment(one: Moment) -> str:
            kind = "average" if one.average else "sum"
            what = {1: "gradient", 2: "squared gradient"}[one.order]
            what = what if one.of_gradient else f"normalised {what}"
            key, position = one.decay
            decay = key if position is None else f"{key}[{position}]"
            return f"{one.tensor}: {kind} of the {what}, decays with {decay}"

        def presets(row: OptimizerState) -> str:
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

        steps = {"group": "in each param_group", "state": "in each parameter's state", None: "none"}
        rows = [
            (
                row.name,
                ", ".join(row.classes),
                "; ".join(map(moment, row.moments)),
                steps[row.step],
                ", ".join(row.hyperparameters),
                presets(row),
            )
            for row in TABLE
        ]
        head = ("optimizer", "classes", "moments", "steps", "hyperparameters", "presets")
        return [trees.table(head, rows)]
