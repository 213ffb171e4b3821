"""The report as a JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..base.values import as_json
from ..plan.decisions import Decision, GroupPlan
from ..plan.resized import ResizedParameter
from ..policy.counters import Counters
from ..policy.document import to_dict
from ..policy.phase import Phase
from ..policy.schema import PolicyDocument
from .log_lines import warnings_of
from .model import MomentReport, OptimizerReport


def policy_json(optimizers: Sequence[OptimizerReport]) -> PolicyDocument | None:
    """What the user asked, as in a policy file; None without an optimizer."""
    if not optimizers:
        return None
    plan = optimizers[0].plan
    return to_dict(plan.policy if plan.phase is None else plan.phase.asked)


def phase_json(phase: Phase | None) -> dict[str, Any] | None:
    """A phase as the reports have it."""
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


def counters_json(counters: tuple[Counters, Counters] | None) -> dict[str, Any] | None:
    """The checkpoint's counters and those the run goes on with."""
    if counters is None:
        return None
    before, after = (asdict(c) for c in counters)
    return {key: {"checkpoint": before[key], "value": after[key]} for key in before}


def optimizer_json(report: OptimizerReport) -> dict[str, Any]:
    """What was done to one optimizer."""
    return {
        "kind": report.kind,
        "plan_digest": report.plan.digest(),
        "step": {
            "value": report.plan.step,
            "checkpoint": report.plan.saved_step,
            "taken": "checkpoint" if report.plan.step == report.plan.saved_step else "policy",
        },
        "moments": _moments_json(report.moments),
        "loss_scale": None
        if report.loss_scale is None
        else dict(zip(("checkpoint", "value"), report.loss_scale, strict=True)),
        "clip_grad": None if (c := report.plan.clip_grad) is None else decision_json(c),
        "warnings": list(warnings_of(report)),
        "loaded": {
            "tensors": dict(report.loaded.tensors),
            "elements": dict(report.loaded.elements),
        },
        "resized": [_resized_json(one) for one in report.resized],
        "unused_saved_groups": list(report.plan.unused_saved_groups),
        "groups": [
            _group_json(g, n) for g, n in zip(report.plan.groups, report.parameters, strict=True)
        ],
    }


def _resized_json(one: ResizedParameter) -> dict[str, Any]:
    return {
        "parameter": one.name,
        "checkpoint_rows": one.saved,
        "rows": one.now,
        "new_rows": one.new,
        "dropped_rows": one.dropped,
    }


def _group_json(group: GroupPlan, parameters: int) -> dict[str, Any]:
    return {
        "index": group.index,
        "saved_index": group.saved_index,
        "note": group.note,
        "parameters_on_rank_0": parameters,
        "dropped_keys": list(group.dropped),
        "keys": {d.key: decision_json(d) for d in group.decisions},
    }


def decision_json(d: Decision) -> dict[str, Any]:
    """Where one key comes from, as the reports have it."""
    return {
        "checkpoint": _value(d.checkpoint),
        "argument": _value(d.argument),
        "value": _value(d.value),
        "taken": d.taken,
        "changed": d.changed,
        "reason": d.reason,
    }


def _value(value: Any) -> Any:
    """A hyperparameter as the schema has it: no object."""
    return str(value) if isinstance(value, Mapping) else as_json(value)


def _moments_json(moments: MomentReport | None) -> dict[str, Any] | None:
    if moments is None:
        return None
    return {
        "rules": [
            {
                "rule": r.rule,
                "exp_avg": r.exp_avg,
                "exp_avg_sq": r.exp_avg_sq,
                "elements": r.elements,
                "examples": list(r.examples),
            }
            for r in moments.rules
        ],
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
