"""Build the JSON document of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..base.values import as_json, fields_as_json
from ..plan.decisions import Decision, GroupPlan, ResumePlan
from ..plan.mapped import Mapped
from ..plan.resized import ResizedParameter
from ..policy.counters import Counters
from ..policy.document import to_dict
from ..policy.phase import Phase
from ..policy.schema import PolicyDocument
from .log_lines import warnings_of
from .model import MomentReport, OptimizerReport
from .schema_optimizer import (
    MomentsDocument,
    OptimizerDocument,
    ReportedGroupDocument,
    ResizedDocument,
)
from .schema_parts import (
    CounterDocument,
    DecisionDocument,
    GroupDocument,
    ParametersReportDocument,
    PhaseDocument,
    RunCountersDocument,
    StepDocument,
)


def policy_json(optimizers: Sequence[OptimizerReport]) -> PolicyDocument | None:
    """Return the user's policy as in a policy file; None without an optimizer."""
    if not optimizers:
        return None
    plan = optimizers[0].plan
    return to_dict(plan.policy if plan.phase is None else plan.phase.asked)


def phase_json(phase: Phase | None) -> PhaseDocument | None:
    """Build the document of a phase."""
    if phase is None:
        return None
    mark = phase.mark
    return {
        "state": phase.state,
        "why": phase.why,
        "name": None if mark is None else mark.phase,
        "from": None if mark is None else mark.source,
        "checkpoint": phase.source or None,
        "operations": list(phase.asked.operations),
        "digest": None if mark is None else mark.operations,
    }


def counters_json(counters: tuple[Counters, Counters] | None) -> RunCountersDocument | None:
    """Build the document of the counters in the checkpoint and after the load."""
    if counters is None:
        return None

    def both(name: str) -> CounterDocument:
        before, after = (getattr(c, name) for c in counters)
        return {"checkpoint": before, "value": after}

    return {
        "iteration": both("iteration"),
        "consumed_train_samples": both("consumed_train_samples"),
        "skipped_train_samples": both("skipped_train_samples"),
        "consumed_valid_samples": both("consumed_valid_samples"),
        "num_steps": both("num_steps"),
    }


def parameters_json(mapped: Mapped) -> ParametersReportDocument:
    """Build the document of the parameters that differ from the checkpoint's."""
    return {
        "new": [fields_as_json(one) for one in mapped.new],
        "copied": [fields_as_json(one) for one in mapped.copied],
        "left": [fields_as_json(one) for one in mapped.left],
    }


def step_json(plan: ResumePlan) -> StepDocument:
    """Build the document of Adam's step."""
    return {
        "value": plan.step,
        "checkpoint": plan.saved_step,
        "taken": "checkpoint" if plan.step == plan.saved_step else "policy",
    }


def optimizer_json(report: OptimizerReport) -> OptimizerDocument:
    """Build the document of one optimizer."""
    return {
        "kind": report.kind,
        "plan_digest": report.plan.digest(),
        "step": step_json(report.plan),
        "moments": _moments_json(report.moments),
        "loss_scale": None
        if (scale := report.loss_scale) is None
        else {"checkpoint": scale[0], "value": scale[1]},
        "clip_grad": None if (c := report.plan.clip_grad) is None else decision_json(c),
        "warnings": list(warnings_of(report)),
        "loaded": {
            "tensors": report.read_shards,
            "elements": report.read_elements,
            "new": {key: report.loaded.made.get(key, 0) for key in report.loaded.keys},
            "proven": report.loaded.proven,
        },
        "resized": [_resized_json(one) for one in report.resized],
        "unused_saved_groups": list(report.plan.unused_saved_groups),
        "groups": [
            _reported_group(g, n)
            for g, n in zip(report.plan.groups, report.parameters, strict=True)
        ],
    }


def _resized_json(one: ResizedParameter) -> ResizedDocument:
    return {
        "parameter": one.name,
        "checkpoint_rows": one.saved,
        "rows": one.now,
        "new_rows": one.new,
        "dropped_rows": one.dropped,
    }


def _reported_group(group: GroupPlan, parameters: int) -> ReportedGroupDocument:
    return {**group_json(group), "parameters_on_rank_0": parameters}


def group_json(group: GroupPlan) -> GroupDocument:
    """Build the document of the decisions for one param_group."""
    return {
        "index": group.index,
        "saved_index": group.saved_index,
        "note": group.note,
        "dropped_keys": list(group.dropped),
        "keys": {d.key: decision_json(d) for d in group.decisions},
    }


def decision_json(d: Decision) -> DecisionDocument:
    """Build the document of the decision for one key."""
    return {
        "checkpoint": _value(d.checkpoint),
        "argument": _value(d.argument),
        "value": _value(d.value),
        "taken": d.taken,
        "changed": d.changed,
        "reason": d.reason,
    }


def _value(value: Any) -> Any:
    """Convert a hyperparameter to JSON. A mapping becomes text, as the schema has no objects."""
    return str(value) if isinstance(value, Mapping) else as_json(value)


def _moments_json(moments: MomentReport | None) -> MomentsDocument | None:
    if moments is None:
        return None
    return {
        "rules": [fields_as_json(r) for r in moments.rules],
        "state": {
            key: {
                "rms_before": as_json(before),
                "rms_after": as_json(after),
                "changed": moments.changed[key],
                "nonfinite": moments.nonfinite[key],
                "unread": moments.unread.get(key, 0),
            }
            for key, (before, after) in moments.rms.items()
        },
    }
