"""What a resume has done: as lines in Megatron's log style, and as JSON.

The JSON follows ``megatron_ext/schemas/resume-report.schema.json``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .counters import Counters
from .moments import LoadedState
from .phase import Phase
from .plan import Decision, GroupPlan, ResumePlan
from .policy_file import to_dict
from .resized import ResizedParameter
from .transition import MomentReport
from .version import __version__

SCHEMA = "megatron_ext/resume-report/1"

_STATE_NAMES = {
    "state": "state (not Adam's)",
    "exp_avg": "exp_avg",
    "exp_avg_sq": "exp_avg_sq",
    "param": "master weights",
}


@dataclass(frozen=True)
class OptimizerReport:
    """What was done to one Megatron optimizer.

    Args:
        kind: Class name of the Megatron optimizer and of the torch optimizer inside.
        plan: The decisions.
        loaded: Tensors and elements brought back, summed over all ranks.
        parameters: For each param_group the number of parameters on rank 0.
        moments: What was done to the moments; None where they are kept as they are.
        notes: What else there is to say.
        loss_scale: The checkpoint's and the one that goes on; None without a dynamic one.
        resized: Parameters with another number of rows than in the checkpoint, on all ranks.
    """

    kind: str
    plan: ResumePlan
    loaded: LoadedState
    parameters: tuple[int, ...]
    moments: MomentReport | None = None
    notes: tuple[str, ...] = ()
    loss_scale: tuple[float, float] | None = None
    resized: tuple[ResizedParameter, ...] = ()


@dataclass
class ResumeReport:
    """What was done in one resume, over all optimizers of the run.

    Args:
        megatron: Version of megatron-core.
        optimizers: One report per Megatron optimizer, in the order of the chain.
        scheduler: Values after the scheduler was loaded: the first resumed step's lr and weight
            decay per group, ``num_steps`` in samples, and the source of every attribute.
        counters: The checkpoint's and those the run goes on with, where Megatron's training loop
            loaded.
        environment: Versions of Python and torch, number of ranks, and when; None where the
            optimizer is a live one.
    """

    megatron: str
    optimizers: list[OptimizerReport] = field(default_factory=list)
    scheduler: dict[str, Any] | None = None
    counters: tuple[Counters, Counters] | None = None
    environment: Mapping[str, str | int] | None = None

    @property
    def phase(self) -> Phase | None:
        """Whether a phase begins or goes on."""
        return self.optimizers[0].plan.phase if self.optimizers else None

    def lines(self, rank: int = 0) -> list[str]:
        """The report as log lines.

        Args:
            rank: Whose report it is: parameters are counted on it.
        """
        out = [*_phase_lines(self.phase), *_counter_lines(self)]
        for number, report in enumerate(self.optimizers):
            out += _optimizer_lines(number, len(self.optimizers), report, rank)
        return out

    def scheduler_lines(self) -> list[str]:
        """The first resumed step as log lines."""
        if self.scheduler is None:
            return []
        first = self.scheduler["first_step"]
        return [
            f" > first resumed step, optimizer {f['optimizer']} group {f['group']}: learning rate "
            f"{f['lr']:.6E}, weight decay {f['weight_decay']:g}"
            for f in first
        ]

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "schema": SCHEMA,
            "megatron_ext": __version__,
            "megatron_core": self.megatron,
            "environment": None if self.environment is None else dict(self.environment),
            "policy": _policy_json(self.optimizers),
            "phase": phase_json(self.phase),
            "counters": counters_json(self.counters),
            "optimizers": [_optimizer_json(r) for r in self.optimizers],
            "scheduler": self.scheduler,
        }


def _optimizer_lines(number: int, count: int, report: OptimizerReport, rank: int) -> list[str]:
    plan, loaded = report.plan, report.loaded
    title = f"resume of optimizer {number} of {count} ({report.kind})"
    lines = [f"megatron_ext: {title}"]
    lines += [
        f" > {name}: using checkpoint value ({loaded.tensors.get(key, 0)} shards, "
        f"{loaded.elements.get(key, 0)} elements on all ranks)"
        for key, name in _STATE_NAMES.items()
        if key in loaded.keys
    ]
    lines += [f" > {one}" for one in report.resized if one.new]  # a warning says the others
    lines += _moment_lines(report)
    where = "checkpoint" if plan.step == plan.saved_step else f"checkpoint {plan.saved_step}"
    lines.append(f" > step: {plan.step} ({where})")
    for group, parameters in zip(plan.groups, report.parameters, strict=True):
        where = "none" if group.saved_index is None else str(group.saved_index)
        lines.append(
            f" > param_group {group.index} ({parameters} parameters on rank {rank}; "
            f"saved group {where}: {group.note})"
        )
        told = [d for d in group.decisions if d.key != "lr"]
        lines += [_decision_line(d) for d in told if d.changed or d.reason != "default"]
        same = [d.key for d in told if not d.changed and d.reason == "default"]
        if same:
            lines.append(f" >   unchanged: {', '.join(same)}")
        if group.dropped:
            lines.append(f" >   only in the checkpoint, not used: {', '.join(group.dropped)}")
    for index in plan.unused_saved_groups:
        lines.append(f" > saved param_group {index} corresponds to no current one: not used")
    return lines


def _phase_lines(phase: Phase | None) -> list[str]:
    if phase is None or phase.state == "none":
        return []
    title = {"applied": "TRANSITION APPLIED", "continued": "CONTINUED"}[phase.state]
    name = f" (phase {phase.mark.phase})" if phase.mark is not None and phase.mark.phase else ""
    return [f"megatron_ext: {title}{name}: {phase.why}"]


#: Counter -> its name in Megatron's log, and the flag that resets it.
_COUNTER_NAMES = {
    "iteration": ("iteration", "--reset-iteration"),
    "consumed_train_samples": ("consumed samples", "--reset-dataloader"),
    "num_steps": ("schedule position (num_steps, in samples)", "--selective-schedule restart"),
}


def _counter_lines(report: ResumeReport) -> list[str]:
    if report.counters is None:
        return []
    before, after = (asdict(c) for c in report.counters)
    lines = []
    asked = None if report.phase is None else report.phase.asked
    for key, (name, flag) in _COUNTER_NAMES.items():
        if key == "num_steps" and asked is not None and asked.schedule_position is None:
            flag = "--reset-iteration"
        why = "checkpoint" if before[key] == after[key] else f"checkpoint {before[key]}; {flag}"
        if after[key] is not None:
            lines.append(f" > {name}: {after[key]} ({why})")
    return lines


def _moment_lines(report: OptimizerReport) -> list[str]:
    moments = report.moments
    lines = []
    if moments is not None:
        lines += [
            f" > {r.rule}: exp_avg {r.exp_avg}, exp_avg_sq {r.exp_avg_sq} ({r.elements} elements "
            "on all ranks)"
            for r in moments.rules
        ]
        lines += [
            f" > {key}: RMS {_rms_text(before)} -> {after:.6g}, {moments.changed[key]} elements "
            f"changed, {moments.nonfinite[key]} not finite{_unread_text(moments, key)}"
            for key, (before, after) in moments.rms.items()
        ]
    if report.loss_scale is not None:
        saved, value = report.loss_scale
        where = (
            "checkpoint" if report.plan.policy.grad_scaler == "keep" else f"checkpoint {saved:g}"
        )
        lines.append(f" > loss scale: {value:g} ({where})")
    lines += [f" > WARNING: {w}" for w in warnings_of(report)]
    if report.plan.clip_grad is not None:
        lines.append(_decision_line(report.plan.clip_grad))
    return lines


def _rms_text(rms: float | None) -> str:
    return "(not read)" if rms is None else f"{rms:.6g}"


def _unread_text(moments: MomentReport, key: str) -> str:
    count = moments.unread.get(key, 0)
    return f"; {count} elements were overwritten without being read" if count else ""


def warnings_of(report: OptimizerReport) -> tuple[str, ...]:
    """Everything a user should look at."""
    of_moments = report.moments.warnings if report.moments is not None else ()
    return (*report.notes, *report.plan.warnings, *of_moments)


def _decision_line(d: Decision) -> str:
    verbs = {
        "checkpoint": "using checkpoint value",
        "arguments": "using argument value",
        "preset": "changed to",
    }
    verb = verbs[d.taken]
    return (
        f" >   {d.key}: {verb} {_text(d.value)} "
        f"(checkpoint {_text(d.checkpoint)}, argument {_text(d.argument)}; {d.reason})"
    )


def _text(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _policy_json(optimizers: Sequence[OptimizerReport]) -> dict[str, Any] | None:
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


def _optimizer_json(report: OptimizerReport) -> dict[str, Any]:
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
        "checkpoint": _json_value(d.checkpoint),
        "argument": _json_value(d.argument),
        "value": _json_value(d.value),
        "taken": d.taken,
        "changed": d.changed,
        "reason": d.reason,
    }


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
                "rms_before": _json_value(before),
                "rms_after": _json_value(after),
                "changed": moments.changed[key],
                "nonfinite": moments.nonfinite[key],
                "unread": moments.unread.get(key, 0),
            }
            for key, (before, after) in moments.rms.items()
        },
    }


def _json_value(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, list | tuple):
        return [_json_value(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if isinstance(value, int | float | str | bool | None) else repr(value)
