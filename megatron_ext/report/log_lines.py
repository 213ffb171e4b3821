"""Format the report as log lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..base.text import first_of
from ..plan.decisions import Decision
from ..plan.mapped import LeftParameter, Mapped, NewParameter
from ..policy.counters import Counters
from ..policy.phase import Phase
from .model import OptimizerReport, RuleReport

#: What is counted under keys that are no tensor's.
_STATE_NAMES = {"state": "other state", "param": "master weights"}


def optimizer_lines(number: int, count: int, report: OptimizerReport, rank: int) -> list[str]:
    """Format the report of one optimizer of the chain."""
    plan = report.plan
    title = f"resume of optimizer {number} of {count} ({report.kind})"
    lines = [f"megatron_ext: {title}"]
    keys = report.loaded.keys
    lines += [_loaded_line(report, key) for key in (*keys[1:], keys[0])]
    lines += _master_lines(report)
    lines += [f" > {one}" for one in report.resized if one.new]  # the others have a warning
    lines += _moment_lines(report)
    where = "checkpoint" if plan.step == plan.saved_step else f"checkpoint {plan.saved_step}"
    if plan.optimizer.step is not None:
        lines.append(f" > step: {plan.step} ({where})")
    for group, parameters in zip(plan.groups, report.parameters, strict=True):
        where = "none" if group.saved_index is None else str(group.saved_index)
        lines.append(
            f" > param_group {group.index} ({parameters} parameters on rank {rank}; "
            f"saved group {where}: {group.note})"
        )
        shown = [d for d in group.decisions if d.key != "lr"]
        lines += [_decision_line(d) for d in shown if d.changed or d.reason != "default"]
        same = [d.key for d in shown if not d.changed and d.reason == "default"]
        if same:
            lines.append(f" >   unchanged: {', '.join(same)}")
        if group.dropped:
            lines.append(f" >   only in the checkpoint, not used: {', '.join(group.dropped)}")
    for index in plan.unused_saved_groups:
        lines.append(f" > saved param_group {index} corresponds to no current one: not used")
    return lines


def _loaded_line(report: OptimizerReport, key: str) -> str:
    shards, elements = report.read_shards.get(key, 0), report.read_elements.get(key, 0)
    made, unread = report.loaded.made.get(key, 0), report.unread.get(key, 0)
    name = _STATE_NAMES.get(key, key)
    new = f"; {made} are new" if made else ""
    if unread and not elements:
        return f" > {name}: not loaded: {unread} elements are overwritten without being read{new}"
    if unread:
        new += f"; {unread} are overwritten without being read"
    count = f"{shards} shards, {elements} elements on all ranks{new}"
    return f" > {name}: loaded from checkpoint ({count})"


def _master_lines(report: OptimizerReport) -> list[str]:
    if report.plan.policy.master_weights == "model":
        return [" > master weights: made from the model's weights, the checkpoint's are not used"]
    count = report.loaded.elements.get("param", 0)
    proven = f"{report.loaded.proven} of {count} elements are proven to be the model's weights"
    if halves := report.loaded.remainders:
        proven += f"; {halves} were stored as remainders, which fit any weights"
    return [f" > master weights: {proven}"] if count else []


def phase_lines(phase: Phase | None) -> list[str]:
    """Format whether a phase begins or continues, and why."""
    if phase is None or phase.state == "none":
        return []
    title = {"applied": "TRANSITION APPLIED", "continued": "CONTINUED"}[phase.state]
    name = f" (phase {phase.mark.phase})" if phase.mark is not None and phase.mark.phase else ""
    return [f"megatron_ext: {title}{name}: {phase.why}"]


def parameter_lines(mapped: Mapped) -> list[str]:
    """Format the parameters whose state has another name in the checkpoint, or is not used."""
    initial = [one for one in mapped.new if one.weights]
    groups = {
        "new, weights as initialised": initial,
        "new to the optimizer": [one for one in mapped.new if not one.weights],
    }
    lines = [_named(f"parameters {what}", found) for what, found in groups.items()]
    if mapped.copied:
        shown = [
            f"{one.name} from {one.source}" + ("" if one.state == "all" else f" ({one.state})")
            for one in mapped.copied
        ]
        lines.append([f" > parameters copied: {len(shown)}: {first_of(shown)}"])
    for why in ("frozen", "replaced", "dropped"):
        found = [one for one in mapped.left if one.why == why]
        lines.append(_named(f"state that is left behind, {why} parameters", found))
    return [line for of_one in lines for line in of_one]


def _named(what: str, found: Sequence[NewParameter | LeftParameter]) -> list[str]:
    elements = sum(one.elements for one in found)
    names = first_of([one.name for one in found])
    return [f" > {what}: {len(found)} ({elements} elements): {names}"] if found else []


#: Counter -> its name in Megatron's log, and the flag that resets it.
_COUNTER_NAMES = {
    "iteration": ("iteration", "--reset-iteration"),
    "consumed_train_samples": ("consumed samples", "--reset-dataloader"),
    "num_steps": ("schedule position (num_steps, in samples)", "--selective-schedule restart"),
}

#: Counter that ``--override-ckpt-iteration`` sets -> the policy's attribute that would reset it.
_OVERRIDDEN = {"iteration": "reset_iteration", "consumed_train_samples": "reset_dataloader"}


def counter_lines(counters: tuple[Counters, Counters] | None, phase: Phase | None) -> list[str]:
    """Format the values at which the counters continue, and why."""
    if counters is None:
        return []
    before, after = (asdict(c) for c in counters)
    lines = []
    asked = None if phase is None else phase.asked
    for key, (name, flag) in _COUNTER_NAMES.items():
        if key == "num_steps" and asked is not None and asked.schedule_position is None:
            flag = "--reset-iteration"
        if asked is not None and key in _OVERRIDDEN and not getattr(asked, _OVERRIDDEN[key]):
            flag = "--override-ckpt-iteration"
        why = "checkpoint" if before[key] == after[key] else f"checkpoint {before[key]}; {flag}"
        if after[key] is not None:
            lines.append(f" > {name}: {after[key]} ({why})")
    return lines


def _moment_lines(report: OptimizerReport) -> list[str]:
    moments = report.moments
    lines = []
    if moments is not None:
        lines += [
            f" > {r.rule}: {_by_tensor(report, r)} ({r.elements} elements on all ranks)"
            for r in moments.rules
        ]
        lines += [
            f" > {key}: RMS {_rms_text(before)} -> {after:.6g}, {moments.changed[key]} elements "
            f"changed, {moments.nonfinite[key]} not finite"
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


def _by_tensor(report: OptimizerReport, rule: RuleReport) -> str:
    """Write what a rule does to each moment that the optimizer has."""
    done = {"exp_avg": rule.exp_avg, "exp_avg_sq": rule.exp_avg_sq}
    tensors = ((report.plan.optimizer.tensor(key), text) for key, text in done.items())
    return ", ".join(f"{tensor} {text}" for tensor, text in tensors if tensor is not None)


def _rms_text(rms: float | None) -> str:
    return "(not read)" if rms is None else f"{rms:.6g}"


def warnings_of(report: OptimizerReport) -> tuple[str, ...]:
    """Collect the warnings of an optimizer: notes, the plan's warnings and idle rules."""
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
