"""Fit the rules of a policy to an optimizer's state, or refuse what has no meaning for it. Pure.

A policy's rule for exp_avg is for the moment of order 1, and that for exp_avg_sq for the moment of
order 2 (`megatron_ext.host.optimizers.Moment`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import CheckpointError, PlanError
from ..host.optimizers import SECOND, OptimizerState, state_of_groups
from ..policy.match import MomentRule
from ..policy.policy import ResumePolicy
from ..policy.presets import OF_BATCH_SIZE, Preset
from ..rules.base import Rule
from ..rules.batch_size import BatchRatio, BatchSize
from ..rules.bias_consistent import BiasConsistent
from ..rules.elementwise import KEEP, RESET, Scale
from ..rules.form import MOMENTS
from ..rules.registry import write

Pair = tuple[Rule, Rule]


def require_own_state(groups: Sequence[Mapping[str, Any]], state: OptimizerState) -> None:
    """Raise if another kind of optimizer has saved the state; stock would take its tensors.

    Args:
        groups: The checkpoint's param_groups. Their keys tell the kind.
        state: The state of the current optimizer.

    Raises:
        CheckpointError: The moments are others, or in another basis.
    """
    saved = state_of_groups(groups)
    if saved is None or not state.moments:
        return
    if (saved.moments, saved.rotated) != (state.moments, state.rotated):
        raise CheckpointError(
            f"the checkpoint's optimizer state is not that of this optimizer: its param_groups are "
            f"those of {saved}; expected those of {state}. Give --optimizer (and "
            "--muon-scalar-optimizer) as in the checkpoint's run, or pass --no-load-optim to start "
            "with a new optimizer (the moments are then lost)"
        )


def fitted_preset(policy: ResumePolicy, state: OptimizerState, name: str) -> Pair:
    """Return what a preset does to the two moments of a parameter.

    Args:
        policy: The policy.
        state: The state of the parameter's optimizer.
        name: The parameter's name.

    Raises:
        PlanError: The preset has no meaning for the state.
    """
    effect, preset = policy.preset.effect, policy.preset
    pair = (effect.exp_avg, effect.exp_avg_sq)
    if state.adam or pair == (KEEP, KEEP) or has_no_effect(preset, state):
        return pair if state.adam else (KEEP, KEEP)
    if reason := _refusal_of_preset(preset, pair, state):
        raise PlanError(
            f"preset {preset}, {name}: {reason}. Take another preset, or rules for the parameters "
            "of the other optimizers"
        )
    if preset.name == "gradient-scale":
        return _scaled(preset, state, "exp_avg"), _scaled(preset, state, "exp_avg_sq")
    m, v = (r if state.moment(k) else KEEP for k, r in zip(MOMENTS, pair, strict=True))
    return m, v


def has_no_effect(preset: Preset, state: OptimizerState) -> str:
    """Explain why a preset leaves the state and the hyperparameters alone; empty if it does not."""
    if preset.name in OF_BATCH_SIZE and not state.adam:
        return "its formulas are derived from Adam's update"
    if preset.name == "bias-consistent" and not state.bias_correction:
        return "its moments have no bias correction"
    return ""


def require_fit(rule: MomentRule, state: OptimizerState, name: str, *, whole: bool) -> None:
    """Raise if a rule has no meaning for a parameter.

    Args:
        rule: A rule that matches it.
        state: The state of its optimizer.
        name: Its name.
        whole: Whether the rule is for all its rows.

    Raises:
        PlanError: The optimizer lacks the tensor, or the rule is not for it. The message names the
            rule, the parameter, and what the optimizer has.
    """
    for key, asked in zip(MOMENTS, (rule.exp_avg, rule.exp_avg_sq), strict=True):
        reason = "" if asked == KEEP else _unfit(key, asked, state, whole=whole)
        if reason:
            raise PlanError(
                f"rule {rule} matches {name}, which {state.name} updates: {reason}. Its state is "
                f"{state}. Narrow the rule, for example with optimizer=adam, or leave {key} out"
            )


def _unfit(key: str, rule: Rule, state: OptimizerState, *, whole: bool) -> str:
    if state.moment(key) is None:
        return f"it has no {key}"
    if isinstance(rule, BatchRatio | BatchSize) and not state.adam:
        return f"{write(rule)!r} is derived from Adam's update"
    if isinstance(rule, BiasConsistent) and not state.bias_correction:
        return "'bias-consistent' is for moments with a bias correction, which it has not"
    alike = rule == RESET or isinstance(rule, Scale | BiasConsistent)
    if state.rotated and not (alike and whole):
        return (
            "its moments are in a basis of their own, where an element belongs to no row or "
            "element of the parameter: only 'reset' and 'scale' of the whole parameter have a "
            "meaning"
        )
    return ""


def _refusal_of_preset(preset: Preset, pair: Pair, state: OptimizerState) -> str:
    if preset.name == "gradient-scale" and not state.follows_scale:
        return (
            f"moments that are scaled are not the state of {state.name} after scaled gradients, "
            f"because {', '.join(state.others) or 'eps'} would have to follow"
        )
    if pair[1] != KEEP and (out_of_reach := SECOND & set(state.others)):
        return f"{', '.join(out_of_reach)} of {state.name} has another shape than the parameter"
    alike = all(r in (KEEP, RESET) or isinstance(r, Scale | BiasConsistent) for r in pair)
    if state.rotated and not alike:
        return f"the moments of {state.name} are in a basis of their own"
    return ""


def _scaled(preset: Preset, state: OptimizerState, key: str) -> Rule:
    """Return the rule for a gradient that is scaled: a moment of order n is scaled by S^n."""
    moment = state.moment(key)
    if moment is None or not moment.of_gradient:
        return KEEP
    return Scale(preset.arguments[0] ** moment.order)
