"""The answer of ``plan`` on one screen: what happens, what changes, what to do next."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..base.values import same
from ..report.log_lines import parameter_lines
from . import output

if TYPE_CHECKING:
    from rich.console import Console

    from ..offline.forecast_model import Forecast, OptimizerForecast

#: Outcome -> its line, and its style on a terminal.
_OUTCOMES = {
    "transition": ("TRANSITION: a phase begins", "bold green"),
    "continued": ("CONTINUED: the checkpoint belongs to this phase already", "bold green"),
    "resume": ("RESUME: no one-time operation requested", "bold green"),
    "drops": ("THE MOMENTS ARE DROPPED", "bold yellow"),
    "refused": ("REFUSED: the run would stop before its first step", "bold red"),
}
#: Lines of one kind before the rest is left to ``--full``, and warnings with their remedy.
_MOST, _MOST_WARNINGS = 6, 2
_LABEL = 14
#: Values of the scheduler that a line about the param_groups tells already.
_TOLD = ("max_lr", "min_lr", "start_wd", "end_wd")
_COUNTERS = {
    "iteration": "iteration",
    "consumed_train_samples": "samples",
    "num_steps": "schedule position",
}


def print_summary(to: Console, found: Forecast, command: Sequence[str], *, full: bool) -> None:
    """Print the verdict, what changes, the warnings and the next command.

    Args:
        to: The console.
        found: The forecast.
        command: The words after ``python -m megatron_ext``.
        full: Whether nothing is left out.
    """
    text, style = _OUTCOMES[found.outcome]
    counts = (("problem", len(found.errors)), ("warning", len(found.all_warnings)))
    counted = [f"{n} {what}{'s' * (n > 1)}" for what, n in counts if n]
    output.print_text(to, "; ".join([text, *counted]), style=style)
    for number, error in enumerate(found.errors, 1):
        output.print_text(to, f"{number}. {error}", 3)
    if found.errors and not full:
        return
    for label, value in _rows(found, full=full):
        output.print_text(to, f"  {label:{_LABEL}}{value}", _LABEL + 2)
    whole = full or len(found.all_warnings) <= _MOST_WARNINGS
    for warning in found.all_warnings:
        shown = warning if whole else _first_sentence(warning)
        output.print_text(to, f"WARNING: {shown}", 2, "yellow")
    for note in found.notes if full else _cut(list(map(_first_sentence, found.notes)), "notes"):
        output.print_text(to, f"note: {note}", 2)
    if not found.errors:
        again = shlex.join(["python", "-m", "megatron_ext", *command, "--emit-command"])
        if len(again) + len("next: ") > to.width:
            again = "the same command with --emit-command prints the torchrun line"
        output.print_text(to, f"next: {again}", 2)


def _rows(found: Forecast, *, full: bool) -> Iterator[tuple[str, str]]:
    from ..offline.planned_arguments import DEFAULT

    stored = found.stored
    form = " ".join(filter(None, (stored.format, stored.sharding_type)))
    yield "checkpoint", f"{stored.directory} ({form})"
    if found.phase is not None and found.phase.state != "none":
        yield "phase", found.phase.why
    yield from _first_steps(found)
    if found.counters is not None:
        before, after = map(dataclasses.asdict, found.counters)
        counted = [(name, before[key], after[key]) for key, name in _COUNTERS.items()]
        told = [f"{name} {_arrow(a, b)}" for name, a, b in counted if a is not None or b]
        yield "counters", ", ".join(told)
    moments: dict[str, list[int]] = {}
    for number, one in enumerate(found.optimizers):
        for text in _moments(one):
            moments.setdefault(text, []).append(number)
    for text, numbers in moments.items():
        all_of_them = len(numbers) == len(found.optimizers)
        yield "moments", text if all_of_them else f"optimizer {numbers[0]}: {text}"
    if found.dropped:
        yield "moments", f"dropped by {found.dropped}"
    changes = [*_changes(found), *_scheduler(found)]
    for name, text in changes if full else changes[:_MOST]:
        yield name, text
    if len(changes) > _MOST and not full:
        yield "", f"and {len(changes) - _MOST} more values: --full"
    for line in parameter_lines(found.mapped):
        name, _, text = line.removeprefix(" > ").partition(": ")
        yield "parameters", f"{name.removeprefix('parameters ')}: {text}"
    for number, one in enumerate(found.optimizers):
        for index in one.plan.unused_saved_groups:
            yield "not used", f"saved param_group {index} of optimizer {number}"
    count = sum(a.source != DEFAULT for a in found.arguments.assumed)
    if count and not full:
        yield "arguments", f"{count} are the checkpoint's (--full prints them as flags)"


def _first_steps(found: Forecast) -> Iterator[tuple[str, str]]:
    """Tell learning rate and weight decay of the first step, each pair of values once."""
    first = {(c.optimizer, c.group): at for c, *at in found.first_step}
    # Without a plan the groups are those of the checkpoint.
    saved: dict[tuple[int, int], Mapping[str, Any]] = {
        (number, index): group
        for number, one in enumerate(found.stored.optimizers)
        for index, group in enumerate(one.groups)
    }
    for number, one in enumerate(found.optimizers):
        for planned in one.plan.groups:
            saved[number, planned.index] = {d.key: d.checkpoint for d in planned.decisions}
    for position, (key, label) in enumerate((("lr", "first lr"), ("weight_decay", "weight decay"))):
        lines: dict[str, list[tuple[int, int]]] = {}
        for place, values in first.items():
            old, new = saved.get(place, {}).get(key), values[position]
            if key == "lr" or not same(old, new):
                ratio = f" ({new / old:.3g}x)" if isinstance(old, float) and old and new else ""
                lines.setdefault(f"{_arrow(old, new)}{ratio * (old != new)}", []).append(place)
        for text, places in lines.items():
            yield label, f"{text}{_where(places, len(first))}"


def _changes(found: Forecast) -> Iterator[tuple[str, str]]:
    """Tell every key of the param_groups that changes or was named, each pair of values once."""
    lines: dict[tuple[str, str], list[tuple[int, int]]] = {}
    total = 0
    for number, one in enumerate(found.optimizers):
        for group in one.plan.groups:
            total += 1
            for d in group.decisions:
                # The first step has been told, and lr is what the scheduler makes of the others.
                if d.key not in ("lr", "weight_decay") or (
                    d.key == "weight_decay" and d.reason != "default"
                ):
                    text = _change(d.checkpoint, d.argument, d.value, d.reason)
                    if text:
                        lines.setdefault((d.key, text), []).append((number, group.index))
        if (clip := one.plan.clip_grad) is not None and number == 0:
            yield "clip_grad", f"{_arrow(clip.argument, clip.value)} ({clip.reason})"
    for (key, text), places in lines.items():
        yield key, f"{text}{_where(places, total)}"


def _scheduler(found: Forecast) -> Iterator[tuple[str, str]]:
    for name, v in found.scheduler.items():
        constant = name == "wd_incr_steps" and found.scheduler["wd_incr_style"].value == "constant"
        if name not in _TOLD and not constant and v.checkpoint is not None:
            kept = "the checkpoint's" if v.taken == "checkpoint" else "default"
            if text := _change(v.checkpoint, v.argument, v.value, kept):
                yield name, text


def _change(checkpoint: Any, argument: Any, value: Any, reason: str) -> str:
    """Tell what happens to a value; empty if nobody has to know."""
    why = "" if reason == "default" else f" ({reason})"
    if not same(checkpoint, value):
        return f"{_arrow(checkpoint, value)}{why}"
    if same(argument, value) or not why:
        return ""
    return f"{output.as_text(value)} kept, not {output.as_text(argument)}{why}"


def _moments(one: OptimizerForecast) -> Iterator[str]:
    step = f"step {_arrow(one.plan.saved_step, one.plan.step)}"
    rules = [r for r in one.rules or () if r.parameters]
    changing = [r for r in rules if (r.exp_avg, r.exp_avg_sq) != ("keep", "keep")]
    if one.rules is None:
        yield f"what the rules cover is not known offline; {step}"
    elif not changing:
        yield f"kept, {step}"
    for number, rule in enumerate(changing):
        text = (
            f"exp_avg {rule.exp_avg}, exp_avg_sq {rule.exp_avg_sq} ({rule.rule}: "
            f"{rule.parameters} parameters, {output.large(rule.elements)} elements)"
        )
        yield f"{step}; {text}" if number == 0 else text


def _arrow(old: Any, new: Any) -> str:
    return output.as_text(new) if same(old, new) else " -> ".join(output.as_texts(old, new))


def _where(places: Sequence[tuple[int, int]], total: int) -> str:
    if len(places) == total:
        return ""
    of = {number: [str(g) for n, g in places if n == number] for number, _ in places}
    several = len(of) > 1 or next(iter(of)) > 0
    named = [
        (f"optimizer {n} " if several else "") + f"group{'s' * (len(g) > 1)} {', '.join(g)}"
        for n, g in of.items()
    ]
    return f" ({'; '.join(named)})"


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=[\w)])\. (?=[A-Z])", text, maxsplit=1)[0]


def _cut(items: list[str], what: str) -> list[str]:
    more = len(items) - _MOST_WARNINGS
    return items if more <= 0 else [*items[:_MOST_WARNINGS], f"{more} more {what}: --full"]
