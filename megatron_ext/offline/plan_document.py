"""Write the forecast of a resume as a JSON document."""

from __future__ import annotations

from ..base.values import as_json, fields_as_json
from ..policy.document import to_dict
from ..report.document import (
    counters_json,
    decision_json,
    group_json,
    parameters_json,
    phase_json,
    step_json,
)
from ..version import __version__
from .forecast_model import Forecast, OptimizerForecast
from .plan_schema import PlanDocument, PlannedOptimizerDocument

SCHEMA = "megatron_ext/resume-plan/1"


def document(found: Forecast) -> PlanDocument:
    """Build the JSON document of a plan (``megatron_ext/schemas/resume-plan.schema.json``).

    Args:
        found: The forecast.
    """
    arguments, stored = found.arguments, found.stored
    content: PlanDocument = {
        "schema": SCHEMA,
        "megatron_ext": __version__,
        "checkpoint": {
            "directory": str(stored.directory),
            "iteration": stored.iteration,
            "format": stored.format,
            "sharding_type": stored.sharding_type,
        },
        "outcome": found.outcome,
        "errors": [str(e) for e in found.errors],
        "warnings": list(found.all_warnings),
        "notes": list(found.notes),
        "arguments": {
            "complete": arguments.complete,
            "parsed_by": arguments.parsed_by,
            "assumed": [fields_as_json(a) for a in arguments.assumed],
            "unknown": list(arguments.unknown),
        },
        "policy": None if found.policy is None else to_dict(found.policy),
        "phase": phase_json(found.phase),
        "counters": counters_json(found.counters),
        "parameters": parameters_json(found.mapped),
        "optimizers": [_optimizer_json(one) for one in found.optimizers],
        "scheduler": {
            "num_steps": None if found.counters is None else found.counters[1].num_steps,
            "values": {
                name: {
                    "checkpoint": one.checkpoint,
                    "argument": one.argument,
                    "value": one.value,
                    "taken": one.taken,
                }
                for name, one in found.scheduler.items()
            },
            "first_step": [
                {"optimizer": c.optimizer, "group": c.group, "lr": lr, "weight_decay": decay}
                for c, lr, decay in found.first_step
            ],
        },
        "curves": [fields_as_json(c) for c in found.curves],
    }
    plain: PlanDocument = as_json(content)
    return plain


def _optimizer_json(one: OptimizerForecast) -> PlannedOptimizerDocument:
    plan = one.plan
    return {
        "step": step_json(plan),
        "clip_grad": None if plan.clip_grad is None else decision_json(plan.clip_grad),
        "groups": [group_json(group) for group in plan.groups],
        "unused_saved_groups": list(plan.unused_saved_groups),
        "rules": None if one.rules is None else [fields_as_json(r) for r in one.rules],
        "resized": [fields_as_json(r) for r in one.resized],
    }
