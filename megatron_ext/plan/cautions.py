r"""Warn about risky plans, with the size of the effect. Pure.

The factors follow from Adam's update, lr m^ / (sqrt(v^) + eps) with m^ = m / (1 - b1^t) and
v^ = v / (1 - b2^t), for a negligible eps (arXiv 1412.6980).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..base.values import same
from ..policy.match import Match
from ..policy.policy import ResumePolicy
from ..policy.presets import OF_BATCH_SIZE
from ..rules.base import ElementRule, Rule
from ..rules.batch_size import BatchRatio
from ..rules.bias_consistent import BiasConsistent
from ..rules.clip import Clip
from ..rules.elementwise import RESET, Scale
from ..rules.form import MOMENTS
from .fitting import has_no_effect

if TYPE_CHECKING:
    from .decisions import Circumstances, ResumePlan

#: Above this ratio the bias of the batch-size rule is worth a warning.
_LARGE_RATIO = 4.0
#: The largest number that rounds to 0 in fp32. bf16 has 16 bits less.
_LARGEST_ZERO = 2.0**-150
#: A loss of larger values than these is worth a warning.
_WORTH_TELLING = {"exp_avg": 1e-10, "exp_avg_sq": 1e-20}


def cautions(plan: ResumePlan, circumstances: Circumstances) -> tuple[str, ...]:
    """Collect the warnings of a plan.

    Args:
        plan: The plan, without its warnings.
        circumstances: Facts about the current run.

    Returns:
        Texts of one or two sentences, the same on every rank.
    """
    if not circumstances.optimizer.adam:
        return tuple(dict.fromkeys(_of_another(plan, circumstances)))
    out = [
        *_step(plan),
        *_partial_reset(plan),
        *_scales(plan.policy),
        *_not_scaled(plan, circumstances),
        *([] if plan.continued else _batch_size(plan.policy, circumstances)),
    ]
    return tuple(dict.fromkeys(out))


def step_growth(betas: tuple[float, float], step: int, next_step: int) -> float:
    """Compute the factor on the first update if m and v are kept and step changes.

    Args:
        betas: b1 and b2.
        step: t before the resume.
        next_step: t after the resume.
    """

    def correction(beta: float, taken: int) -> float:
        return 1.0 - beta ** (taken + 1)

    b1, b2 = betas
    first = correction(b1, step) / correction(b1, next_step)
    second = correction(b2, next_step) / correction(b2, step)
    return first * math.sqrt(second)


def fresh_update(betas: tuple[float, float], step: int) -> float:
    """Compute the first update, in units of lr, of an element with m = v = 0 if step stays t."""
    b1, b2 = betas
    m = (1.0 - b1) / (1.0 - b1 ** (step + 1))
    v = (1.0 - b2) / (1.0 - b2 ** (step + 1))
    return m / math.sqrt(v)


def lost_step(plan: ResumePlan, *, iteration_known: bool) -> Iterator[str]:
    """Warn about a checkpoint whose param_groups have no step.

    Args:
        plan: The plan, whose step is the checkpoint's iteration if that is known.
        iteration_known: Whether it is; before the first iteration there is no step to miss.
    """
    if plan.policy.next_step != "keep" or (iteration_known and plan.step is None):
        return
    what = (
        "the checkpoint's param_groups have no step, which Megatron does not store if the first "
        "pipeline stage trains nothing"
    )
    if plan.step is not None:
        yield (
            f"{what}: step is set to the checkpoint's iteration, {plan.step}. If the optimizer "
            "took another number of steps, pass --selective-step N"
        )
        return
    for b1, b2 in betas_of(plan):
        yield (
            f"{what}: Adam's bias correction starts anew, so that at betas {b1:g}, {b2:g} the "
            f"first update may be {math.sqrt(1.0 - b2) / (1.0 - b1):.2f} times as large. Pass "
            "--selective-step N with the number of steps taken, or 0 before the first"
        )


def _of_another(plan: ResumePlan, circumstances: Circumstances) -> Iterator[str]:
    """Warn about what a policy means for an optimizer that is not Adam."""
    policy, state = plan.policy, circumstances.optimizer
    preset = policy.preset
    if reason := has_no_effect(preset, state):
        yield f"preset {preset} does not change the state and groups of {state.name}: {reason}"
    if preset.name == "gradient-scale":
        if not state.scale_free:
            yield (
                f"preset {preset}: the update of {state.name} is {preset.arguments[0]:g}x as large "
                "for such a gradient. Divide --lr by that to keep it"
            )
        yield from _not_scaled(plan, circumstances)
    if state.step is None and policy.step not in (None, "keep"):
        yield f"step {policy.step}: {state.name} does not depend on the number of steps"
    for key, rule in _firsts_and_seconds(policy):
        if (moment := state.moment(key)) is not None:
            yield from _underflow(key, moment.tensor, rule)


def _firsts_and_seconds(policy: ResumePolicy) -> Iterator[tuple[str, Rule]]:
    for m, v in _operations(policy):
        yield "exp_avg", m
        yield "exp_avg_sq", v


def _step(plan: ResumePlan) -> Iterator[str]:
    policy, t, after = plan.policy, plan.saved_step, plan.step
    operations = _operations(policy)
    if any(isinstance(o, BiasConsistent) for pair in operations for o in pair) and not t:
        yield "bias-consistent has no effect: the checkpoint was written before the first step"
    if t is None or after is None or t == after:
        return
    if any(pair == (RESET, RESET) for pair in operations) and after == 0:
        steps = max((1.0 / (1.0 - b2) for _, b2 in betas_of(plan)), default=0.0)
        # If the gradient is pure noise, the variance of m^ is (1 - b1) / (1 + b1) times its own.
        ratio = max((math.sqrt((1.0 + b1) / (1.0 - b1)) for b1, _ in betas_of(plan)), default=1.0)
        yield (
            f"exp_avg, exp_avg_sq and step are reset: without a re-warm-up of about {steps:.0f} "
            f"steps the first updates have RMS lr, up to {ratio:.1f}x the stationary one"
        )
    if any(v == RESET and m != RESET for m, v in operations) and after == 0:
        for b1, _ in betas_of(plan):
            yield (
                "exp_avg_sq and step are reset and exp_avg is not: the first update divides the "
                f"old momentum by 1 - b1 and by one gradient, about {1.0 / (1.0 - b1):.0f}x"
            )
    if any(m.keeps_bias and v.keeps_bias for m, v in operations):
        for betas in betas_of(plan):
            growth = step_growth(betas, t, after)
            if abs(growth - 1.0) > 0.01:
                yield (
                    f"step goes from {t} to {after} while moments are kept: at betas "
                    f"{betas[0]:g}, {betas[1]:g} the first update {_verb(growth)} to "
                    f"{growth:.2f}x. The rule bias-consistent keeps it the same"
                )


def _partial_reset(plan: ResumePlan) -> Iterator[str]:
    if not plan.step:
        return
    operations = _operations(plan.policy)
    for betas in betas_of(plan):
        if (RESET, RESET) in operations:
            yield (
                f"moments are reset while step stays at {plan.step}: they get no bias correction, "
                f"and at betas {betas[0]:g}, {betas[1]:g} their first update is "
                f"{fresh_update(betas, plan.step):.2f} lr. The remedy is 'fill mean' or "
                "'fill column-mean' for exp_avg_sq"
            )
        if any(v == RESET and m != RESET for m, v in operations):
            bound = 1.0 / math.sqrt((1.0 - betas[1]) / (1.0 - betas[1] ** (plan.step + 1)))
            yield (
                f"exp_avg_sq is reset and exp_avg is not, while step stays at {plan.step}: at b2 = "
                f"{betas[1]:g} the first update can be {bound:.1f}x what it was"
            )


def _scales(policy: ResumePolicy) -> Iterator[str]:
    for m, v in _operations(policy):
        a, b = (o.multiplier if isinstance(o, ElementRule) else None for o in (m, v))
        if a and b and abs(abs(a) / math.sqrt(b) - 1.0) > 0.01:
            growth = abs(a) / math.sqrt(b)
            yield (
                f"exp_avg is multiplied by {a:g} and exp_avg_sq by {b:g}: Adam divides the one by "
                f"the root of the other, so the first update {_verb(growth)} to {growth:.4g}x "
                "where the gradient is small"
            )
        for key, rule in zip(MOMENTS, (m, v), strict=True):
            yield from _underflow(key, key, rule)


def _underflow(key: str, tensor: str, rule: Rule) -> Iterator[str]:
    factor = rule.multiplier if isinstance(rule, ElementRule) else None
    lost = _LARGEST_ZERO / abs(factor) if factor else 0.0
    if lost > _WORTH_TELLING[key]:
        yield (
            f"{tensor} is multiplied by {factor:g}: what is below {lost:.2g} becomes 0 (in bf16 "
            f"below {lost * 2.0**16:.2g})"
        )


def _verb(growth: float) -> str:
    return "grows" if growth > 1.0 else "shrinks"


def _not_scaled(plan: ResumePlan, circumstances: Circumstances) -> Iterator[str]:
    policy = plan.policy
    clipping = circumstances.clip_grad > 0.0
    for change in policy.preset.declined:
        if change.key == "clip_grad" and not clipping:
            continue
        yield f"preset {policy.preset}: {change.key} is declined and does not change"
    for change in policy.preset.effect.changes:
        if change.key == "clip_grad":
            if clipping and circumstances.live:
                yield f"preset {policy.preset}: clip_grad of the running optimizer is not changed"
            continue
        decisions = [d for g in plan.groups for d in g.decisions if d.key == change.key]
        if circumstances.live and decisions:
            yield f"preset {policy.preset}: {change.key} of the running optimizer is not changed"
        elif any(d.taken == "checkpoint" for d in decisions):
            yield (
                f"preset {policy.preset}: {change.key} comes from the checkpoint and does not "
                "follow the preset"
            )
        for d in decisions:
            if (
                d.taken == "preset"
                and d.checkpoint is not None
                and not same(d.checkpoint, d.argument)
                and not same(d.checkpoint, d.value)
            ):
                yield (
                    f"preset {policy.preset}: {change.key} is {d.checkpoint} in the checkpoint and "
                    f"{d.argument} in the arguments, and the preset changes it again, to "
                    f"{d.value}. Decline {change.decline} if you have scaled it yourself"
                )


def _batch_size(policy: ResumePolicy, circumstances: Circumstances) -> Iterator[str]:
    ratios = {o.ratio for pair in _operations(policy) for o in pair if isinstance(o, BatchRatio)}
    for ratio in sorted(ratios):
        yield f"the batch-size rule for exp_avg_sq (k = {ratio:g}) is experimental"
        if ratio > _LARGE_RATIO:
            yield (
                f"batch-size: k = {ratio:g} is above 4, and the rule's bias grows with k: for a "
                "pure-noise gradient it is about +8% at 4 and +39% at 16"
            )
    sizes: tuple[float, float] | None = circumstances.global_batch_size
    if policy.preset.name in OF_BATCH_SIZE:
        old, new = (int(a) if a.is_integer() else a for a in policy.preset.arguments)
        if sizes is not None and sizes != (old, new):
            yield (
                f"preset {policy.preset}: the global batch size was {sizes[0]} in the checkpoint's "
                f"run and is {sizes[1]} in this one"
            )
        sizes = sizes or (old, new)
    if sizes is not None and sizes[0] != sizes[1]:
        yield (
            f"the global batch size goes from {sizes[0]} to {sizes[1]}: schedule and data "
            "position count samples, so they continue at the same sample, and each iteration moves "
            f"them {sizes[1] / sizes[0]:g}x as far. Arguments that count iterations count the new "
            "ones"
        )


def _operations(policy: ResumePolicy) -> list[tuple[Rule, Rule]]:
    effect = policy.preset.effect
    pairs = [(r.exp_avg, r.exp_avg_sq) for r in policy.rules]
    everything = any(r.match == Match() for r in policy.rules)
    pairs = pairs if everything else [(effect.exp_avg, effect.exp_avg_sq), *pairs]
    return [(_or_reset(m), _or_reset(v)) for m, v in pairs]


def _or_reset(rule: Rule) -> Rule:
    """Return `RESET` for a rule that leaves nothing, because fp32 rounds its factor to 0."""
    factor = rule.factor if isinstance(rule, Scale) else 1.0
    factor = rule.limit if isinstance(rule, Clip) else factor
    return RESET if abs(factor) <= _LARGEST_ZERO else rule


def betas_of(plan: ResumePlan) -> list[tuple[float, float]]:
    """List the distinct betas that the param_groups have after the resume."""
    values = (d.value for g in plan.groups for d in g.decisions if d.key == "betas")
    return sorted({(float(b[0]), float(b[1])) for b in values if b is not None})
