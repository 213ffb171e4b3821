"""Warnings: said where they are due, with the number, and nowhere else."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.checkpoint.state import SavedOptimizer
from megatron_ext.host.optimizers import TABLE
from megatron_ext.plan.cautions import fresh_update, step_growth
from megatron_ext.plan.decisions import Circumstances
from megatron_ext.plan.hyperparameters import plan_resume
from megatron_ext.policy.match import Match, MomentRule
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import Preset
from megatron_ext.rules.base import Rule
from megatron_ext.rules.batch_size import BatchRatio
from megatron_ext.rules.clip import Clip
from megatron_ext.rules.elementwise import KEEP, RESET, Fill, Scale
from megatron_ext.rules.fill_from import FillFrom
from tests.support.groups import GROUPS, LISTS, STEPS, group

LATE = 1_000_000


def warnings(
    policy: ResumePolicy,
    betas: tuple[float, float] = (0.9, 0.95),
    step: int | None = LATE,
    saved: dict[str, Any] | None = None,
    current: dict[str, Any] | None = None,
    **circumstances: Any,
) -> tuple[str, ...]:
    return plan_resume(
        policy,
        SavedOptimizer((saved or group(betas=betas),), step),
        [current or group(betas=betas)],
        Circumstances(**circumstances),
    ).warnings


def rules(*pairs: tuple[Rule, Rule], match: str = "w*") -> ResumePolicy:
    return ResumePolicy(
        rules=tuple(MomentRule(Match(f"{match}{i}"), *p) for i, p in enumerate(pairs))
    )


@given(saved=LISTS, current=LISTS, step=STEPS, clip=st.sampled_from((0.0, 1.0)))
def test_the_default_policy_has_nothing_to_warn_of(
    saved: list[dict[str, Any]], current: list[dict[str, Any]], step: int | None, clip: float
) -> None:
    plan = plan_resume(
        ResumePolicy(), SavedOptimizer(tuple(saved), step), current, Circumstances(clip)
    )
    assert plan.warnings == ()


@given(current=GROUPS, step=STEPS)
def test_keeping_hyperparameters_is_nothing_to_warn_of(
    current: dict[str, Any], step: int | None
) -> None:
    policy = ResumePolicy(("eps", "betas"), step="keep")
    assert warnings(policy, step=step, current=current, global_batch_size=(8, 8)) == ()


# --- step


@pytest.mark.parametrize(
    ("betas", "verb", "number"),
    [
        ((0.9, 0.95), "grows", "2.24"),
        ((0.9, 0.98), "grows", "1.41"),
        ((0.9, 0.999), "shrinks", "0.32"),
    ],
)
def test_a_reset_of_step_alone_tells_the_size_of_the_first_update(
    betas: tuple[float, float], verb: str, number: str
) -> None:
    assert warnings(ResumePolicy(step="reset"), betas) == (
        f"step goes from {LATE} to 0 while moments are kept: at betas {betas[0]:g}, {betas[1]:g} "
        f"the first update {verb} to {number}x. The rule bias-consistent keeps it the same",
    )


@given(
    betas=st.tuples(st.floats(0.5, 0.999), st.floats(0.5, 0.9999)),
    step=st.integers(1, 10**6),
    after=st.integers(0, 10**6),
    moments=st.tuples(st.floats(-10.0, 10.0), st.floats(1e-6, 10.0)),
)
def test_the_growth_is_the_ratio_of_two_adam_updates(
    betas: tuple[float, float], step: int, after: int, moments: tuple[float, float]
) -> None:
    def update(t: int) -> float:
        """Adam's update with these moments and a gradient that leaves them as they are."""
        m, v = moments[0] + 0.1, moments[1]
        return m / (1 - betas[0] ** t) / math.sqrt(v / (1 - betas[1] ** t))

    before = update(step + 1)
    if before == 0.0:
        return
    assert step_growth(betas, step, after) == pytest.approx(update(after + 1) / before)


def test_a_step_that_stays_or_no_longer_matters_is_no_news() -> None:
    assert warnings(ResumePolicy(step=LATE)) == ()
    assert warnings(ResumePolicy(step=2 * LATE)) == ()
    assert warnings(ResumePolicy(step="reset"), step=None) == ()
    assert warnings(ResumePolicy(step=7), step=8)[0].startswith("step goes from 8 to 7")


def test_every_pair_of_betas_has_its_number() -> None:
    groups = [group(betas=(0.9, 0.95)), group(betas=(0.9, 0.98), lr_mult=0.1)]
    saved = SavedOptimizer(tuple(groups), LATE)
    found = plan_resume(ResumePolicy(step="reset"), saved, groups).warnings
    assert ["2.24x" in w for w in found] == [True, False]
    assert ["1.41x" in w for w in found] == [False, True]


def test_the_betas_after_the_resume_count() -> None:
    saved, now = group(betas=(0.9, 0.98)), group(betas=(0.9, 0.95))
    assert "2.24x" in warnings(ResumePolicy(step="reset"), saved=saved, current=now)[0]
    kept = ResumePolicy(("betas",), step="reset")
    assert "1.41x" in warnings(kept, saved=saved, current=now)[0]


@pytest.mark.parametrize(
    "policy",
    [
        ResumePolicy(preset=Preset("relora", (0.5,)), step="reset"),
        ResumePolicy(preset=Preset("gradient-scale", (2.0,)), step="reset"),
        ResumePolicy(preset=Preset("reset"), rules=rules((KEEP, KEEP)).rules),
    ],
)
def test_moments_that_are_scaled_or_pruned_go_on_with_their_bias_too(policy: ResumePolicy) -> None:
    assert any("the first update grows to 2.24x" in w for w in warnings(policy))


@pytest.mark.parametrize(
    "policy",
    [
        ResumePolicy(preset=Preset("bias-consistent"), step=7),
        ResumePolicy(preset=Preset("reset")),
        ResumePolicy(step="reset", rules=(MomentRule(Match(), Fill(0.5), FillFrom("mean")),)),
    ],
)
def test_moments_that_do_not_go_on_have_no_growth(policy: ResumePolicy) -> None:
    assert not any("first update grows" in w for w in warnings(policy))


def test_a_full_reset_asks_for_a_warm_up() -> None:
    assert warnings(ResumePolicy(preset=Preset("reset")), (0.9, 0.999)) == (
        "exp_avg, exp_avg_sq and step are reset: without a re-warm-up of about 1000 steps the "
        "first updates have RMS lr, up to 4.4x the stationary one",
    )
    assert "about 20 steps" in warnings(ResumePolicy(preset=Preset("reset")))[0]
    assert "up to 1.7x" in warnings(ResumePolicy(preset=Preset("reset")), (0.5, 0.9))[0]


def test_old_momentum_over_a_new_exp_avg_sq_tells_the_factor() -> None:
    policy = ResumePolicy(step="reset", rules=(MomentRule(Match(), KEEP, RESET),))
    assert any("about 10x" in w for w in warnings(policy, (0.9, 0.95)))


def test_bias_consistent_before_the_first_step_has_no_effect() -> None:
    policy = ResumePolicy(preset=Preset("bias-consistent"))
    message = "bias-consistent has no effect: the checkpoint was written before the first step"
    assert warnings(policy, step=None) == (message,)
    assert warnings(policy, step=0) == (message,)
    assert warnings(policy, step=3) == ()


# --- partial resets


@pytest.mark.parametrize(
    ("betas", "number"), [((0.9, 0.95), "0.45"), ((0.9, 0.999), "3.16"), ((0.9, 0.98), "0.71")]
)
def test_a_partial_reset_at_a_late_step_tells_the_first_update(
    betas: tuple[float, float], number: str
) -> None:
    assert warnings(rules((RESET, RESET)), betas) == (
        f"moments are reset while step stays at {LATE}: they get no bias correction, and at betas "
        f"{betas[0]:g}, {betas[1]:g} their first update is {number} lr. The remedy is 'fill mean' "
        "or 'fill column-mean' for exp_avg_sq",
    )


@given(
    betas=st.tuples(st.floats(0.5, 0.999), st.floats(0.5, 0.9999)),
    step=st.integers(1, 10**6),
    gradient=st.floats(1e-3, 1e3),
)
def test_a_fresh_update_is_adams_first_from_zero(
    betas: tuple[float, float], step: int, gradient: float
) -> None:
    m = (1 - betas[0]) * gradient / (1 - betas[0] ** (step + 1))
    v = (1 - betas[1]) * gradient**2 / (1 - betas[1] ** (step + 1))
    assert fresh_update(betas, step) == pytest.approx(m / math.sqrt(v))


def test_a_fill_is_the_remedy() -> None:
    assert warnings(rules((RESET, FillFrom("mean")))) == ()
    assert warnings(ResumePolicy(preset=Preset("reset-momentum"))) == ()


@pytest.mark.parametrize(("b2", "number"), [(0.95, "4.5"), (0.999, "31.6")])
def test_exp_avg_sq_reset_by_itself_tells_the_bound(b2: float, number: str) -> None:
    assert warnings(rules((KEEP, RESET)), (0.9, b2)) == (
        f"exp_avg_sq is reset and exp_avg is not, while step stays at {LATE}: at b2 = {b2:g} the "
        f"first update can be {number}x what it was",
    )


# --- scales


@pytest.mark.parametrize(
    ("m", "v", "verb", "number"),
    [
        (KEEP, Scale(0.25), "grows", "2"),
        (KEEP, Scale(1e-6), "grows", "1000"),
        (Scale(-2.0), KEEP, "grows", "2"),
        (Scale(0.5), Scale(0.01), "grows", "5"),
        (KEEP, Scale(4.0), "shrinks", "0.5"),
        (Scale(0.1), KEEP, "shrinks", "0.1"),
    ],
)
def test_a_scale_that_the_other_moment_does_not_follow_tells_the_first_update(
    m: Rule, v: Rule, verb: str, number: str
) -> None:
    a, b = (r.factor if isinstance(r, Scale) else 1.0 for r in (m, v))
    assert warnings(rules((m, v))) == (
        f"exp_avg is multiplied by {a:g} and exp_avg_sq by {b:g}: Adam divides the one by the root "
        f"of the other, so the first update {verb} to {number}x where the gradient is small",
    )


@given(factor=st.floats(1e-12, 1e12))
def test_a_scale_of_both_is_no_news(factor: float) -> None:
    assert warnings(rules((Scale(factor), Scale(factor * factor)))) == ()


@pytest.mark.parametrize("none", [Scale(0.0), Scale(1e-50), Clip(0.0)])
def test_a_rule_that_leaves_nothing_is_a_reset(none: Rule) -> None:
    assert warnings(rules((KEEP, none)), (0.9, 0.95)) == warnings(rules((KEEP, RESET)), (0.9, 0.95))
    assert warnings(rules((none, none)))[0].startswith("moments are reset while step stays")


def test_a_scale_that_leaves_fp32_tells_what_becomes_0() -> None:
    found = warnings(ResumePolicy(preset=Preset("gradient-scale", (1e-15,))))
    assert found == (
        "exp_avg_sq is multiplied by 1e-30: what is below 7e-16 becomes 0 (in bf16 below 4.6e-11)",
    )
    assert warnings(ResumePolicy(preset=Preset("gradient-scale", (1e-3,)))) == ()


def test_a_rule_for_everything_takes_the_presets_place() -> None:
    everything = ResumePolicy(
        preset=Preset("reset"), step="keep", rules=(MomentRule(Match(), Scale(2.0), Scale(4.0)),)
    )
    assert warnings(everything) == ()


# --- what a preset cannot change


def test_what_is_kept_from_the_checkpoint_does_not_follow_and_that_is_said() -> None:
    policy = ResumePolicy(("eps",), preset=Preset("gradient-scale", (2.0,)))
    assert warnings(policy, clip_grad=1.0) == (
        "preset gradient-scale 2: eps comes from the checkpoint and does not follow the preset",
    )


def test_what_follows_is_no_news() -> None:
    assert warnings(ResumePolicy(preset=Preset("gradient-scale", (2.0,))), clip_grad=1.0) == ()


def test_what_is_declined_is_said() -> None:
    policy = ResumePolicy(preset=Preset("gradient-scale", (2.0,), ("eps", "clip_grad")))
    eps = "preset gradient-scale 2: eps is declined and does not change"
    clip = "preset gradient-scale 2: clip_grad is declined and does not change"
    assert warnings(policy, clip_grad=1.0) == (eps, clip)
    assert warnings(policy, clip_grad=0.0) == (eps,)


def test_a_value_that_seems_to_be_scaled_already_is_pointed_out() -> None:
    policy = ResumePolicy(preset=Preset("gradient-scale", (2.0,)))
    assert warnings(policy, saved=group(eps=1e-8), current=group(eps=2e-8)) == (
        "preset gradient-scale 2: eps is 1e-08 in the checkpoint and 2e-08 in the arguments, and "
        "the preset changes it again, to 4e-08. Decline eps if you have scaled it yourself",
    )
    as_a_list = group(betas=[0.9, 0.95])
    found = warnings(ResumePolicy(preset=Preset("batch-size", (1, 2))), saved=as_a_list)
    assert not any("changes it again" in w for w in found)


def test_a_running_optimizers_hyperparameters_are_said_to_stay() -> None:
    policy = ResumePolicy(preset=Preset("gradient-scale", (2.0,)))
    assert warnings(policy, clip_grad=1.0, live=True) == (
        "preset gradient-scale 2: eps of the running optimizer is not changed",
        "preset gradient-scale 2: clip_grad of the running optimizer is not changed",
    )
    assert len(warnings(policy, clip_grad=0.0, live=True)) == 1


def test_of_another_optimizer_only_the_preset_is_named() -> None:
    """Adam's cautions are not for others; what a policy means for them is said."""
    rows = {row.name: row for row in TABLE}
    muon, sgd, soap = rows["Muon"], rows["SGD"], rows["SOAP"]
    assert warnings(ResumePolicy(preset=Preset("reset")), optimizer=muon) == ()
    assert warnings(ResumePolicy(preset=Preset("batch-size", (1, 2))), optimizer=muon) == (
        "preset batch-size 1 2 does not change the state and groups of Muon: its formulas are "
        "derived from Adam's update",
    )
    consistent = ResumePolicy(preset=Preset("bias-consistent"))
    assert warnings(consistent, optimizer=soap) == ()
    assert warnings(consistent, optimizer=sgd) == (
        "preset bias-consistent does not change the state and groups of SGD: its moments have no "
        "bias correction",
    )
    without_decay = {name: group(weight_decay=0.0) for name in ("saved", "current")}
    scaled = ResumePolicy(preset=Preset("gradient-scale", (4.0,)))
    assert warnings(scaled, optimizer=muon) == ()
    assert warnings(scaled, optimizer=sgd, **without_decay) == (
        "preset gradient-scale 4: the update of SGD is 4x as large for such a gradient. Divide "
        "--lr by that to keep it",
    )
    assert warnings(ResumePolicy(step=3), optimizer=muon) == (
        "step 3: Muon does not depend on the number of steps",
    )
    assert warnings(ResumePolicy(step=3), optimizer=soap) == ()


# --- batch size


EXPERIMENTAL = "the batch-size rule for exp_avg_sq (k = {:g}) is experimental"
BIAS = (
    "batch-size: k = {:g} is above 4, and the rule's bias grows with k: for a pure-noise gradient "
    "it is about +8% at 4 and +39% at 16"
)


@pytest.mark.parametrize(
    ("ratio", "large"), [(0.25, False), (4.0, False), (4.5, True), (16.0, True)]
)
def test_a_ratio_above_4_tells_the_bias(ratio: float, large: bool) -> None:
    found = warnings(rules((KEEP, BatchRatio(ratio))))
    assert found == (EXPERIMENTAL.format(ratio), *([BIAS.format(ratio)] if large else []))


def test_the_same_ratio_in_two_rules_is_told_once() -> None:
    found = warnings(rules((KEEP, BatchRatio(8.0)), (KEEP, BatchRatio(8.0))))
    assert found == (EXPERIMENTAL.format(8), BIAS.format(8))


def moves(old: int, new: int, ratio: str) -> str:
    return (
        f"the global batch size goes from {old} to {new}: schedule and data position count "
        f"samples, so they continue at the same sample, and each iteration moves them {ratio}x as "
        "far. Arguments that count iterations count the new ones"
    )


def test_another_global_batch_size_is_told_whatever_the_policy() -> None:
    found = warnings(ResumePolicy(), global_batch_size=(256, 1024))
    assert found == (moves(256, 1024, "4"),)
    assert warnings(ResumePolicy(), global_batch_size=(8, 4)) == (moves(8, 4, "0.5"),)
    assert warnings(ResumePolicy(), global_batch_size=(256, 256)) == ()
    assert warnings(ResumePolicy(), global_batch_size=None) == ()


def test_the_preset_says_all_it_should() -> None:
    policy = ResumePolicy(preset=Preset("batch-size", (256, 1024), ("betas",)))
    assert warnings(policy, global_batch_size=(256, 1024)) == (
        "preset batch-size 256 1024: betas is declined and does not change",
        EXPERIMENTAL.format(4),
        moves(256, 1024, "4"),
    )
    assert warnings(policy) == warnings(policy, global_batch_size=(256, 1024))


def test_declining_the_experimental_part_leaves_nothing_experimental() -> None:
    policy = ResumePolicy(preset=Preset("batch-size", (256, 2048), ("exp_avg_sq",)))
    assert warnings(policy, (0.95, 0.95)) == (moves(256, 2048, "8"),)


def test_a_preset_that_does_not_fit_the_run_is_told() -> None:
    policy = ResumePolicy(preset=Preset("batch-size", (256, 1024), ("exp_avg_sq",)))
    assert warnings(policy, global_batch_size=(256, 512)) == (
        "preset batch-size 256 1024: the global batch size was 256 in the checkpoint's run and is "
        "512 in this one",
        moves(256, 512, "2"),
    )


def test_a_ratio_given_by_two_fractions_is_no_division_by_zero() -> None:
    policy = ResumePolicy(preset=Preset("batch-size", (0.5, 2.0), ("exp_avg_sq",)))
    (found,) = warnings(policy, (0.9, 0.95))
    assert found.startswith("the global batch size goes from 0.5 to 2: ")
    assert "4x as far" in found
