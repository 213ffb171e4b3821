"""Presets against formulas written out by hand, and what is declined."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_ext.checkpoint.state import SavedOptimizer
from megatron_ext.errors import PlanError, PolicyError
from megatron_ext.host.optimizers import TABLE
from megatron_ext.plan.decisions import Circumstances, Decision, ResumePlan
from megatron_ext.plan.hyperparameters import plan_resume
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import CATALOGUE, KEEP_ALL, Effect, Preset, forms
from megatron_ext.rules.batch_size import BatchRatio
from megatron_ext.rules.bias_consistent import BiasConsistent
from megatron_ext.rules.elementwise import KEEP, RESET, Scale
from megatron_ext.rules.prune import Prune
from tests.support.groups import group

CLIPPING = Circumstances(clip_grad=1.0)


def plan(
    policy: ResumePolicy,
    saved: dict[str, Any] | None = None,
    current: dict[str, Any] | None = None,
    circumstances: Circumstances = CLIPPING,
) -> ResumePlan:
    return plan_resume(
        policy, SavedOptimizer((saved or group(),), 100), [current or group()], circumstances
    )


def decision(found: ResumePlan, key: str) -> Decision:
    return next(d for d in found.groups[0].decisions if d.key == key)


def changed(found: ResumePlan) -> dict[str, Any]:
    """The keys that a preset changes, and their values."""
    return {d.key: d.value for d in found.groups[0].decisions if d.taken == "preset"}


# --- what each does to moments and step


@pytest.mark.parametrize(
    ("preset", "exp_avg", "exp_avg_sq", "step"),
    [
        (Preset(), KEEP, KEEP, "keep"),
        (Preset("reset"), RESET, RESET, "reset"),
        (Preset("reset-momentum"), RESET, KEEP, "keep"),
        (Preset("bias-consistent"), BiasConsistent(), BiasConsistent(), "keep"),
        (Preset("gradient-scale", (3.0,)), Scale(3.0), Scale(9.0), "keep"),
        (Preset("batch-sqrt", (256, 1024)), KEEP, KEEP, "keep"),
        (Preset("batch-size", (256, 1024)), KEEP, BatchRatio(4.0), "keep"),
        (Preset("relora", (0.9,)), Prune(0.9), Prune(0.9), "keep"),
    ],
)
def test_what_a_preset_does_to_moments_and_step(
    preset: Preset, exp_avg: object, exp_avg_sq: object, step: str
) -> None:
    effect = preset.effect
    assert (effect.exp_avg, effect.exp_avg_sq, effect.step) == (exp_avg, exp_avg_sq, step)


def test_every_preset_says_where_it_comes_from_and_how_it_is_written() -> None:
    assert forms() == [
        "keep",
        "reset",
        "reset-momentum",
        "bias-consistent",
        "gradient-scale S",
        "batch-sqrt OLD NEW",
        "batch-size OLD NEW",
        "relora P",
    ]
    assert all(entry.what and entry.source for entry in CATALOGUE.values())
    assert Effect() == KEEP_ALL.effect == Preset("keep").effect


# --- hyperparameters, by hand


@given(
    old=st.integers(1, 4096),
    new=st.integers(1, 4096),
    lr=st.floats(1e-6, 1.0),
    eps=st.floats(1e-12, 1e-3),
    rest=st.tuples(st.floats(1e-4, 0.5), st.floats(1e-4, 0.5)),
)
def test_batch_size_by_the_square_root_rule(
    old: int, new: int, lr: float, eps: float, rest: tuple[float, float]
) -> None:
    k = new / old
    policy = ResumePolicy(preset=Preset("batch-size", (old, new)))
    current = group(
        max_lr=lr, min_lr=lr / 10, eps=eps, betas=(1 - rest[0], 1 - rest[1]), weight_decay=0.25
    )
    if k * max(rest) >= 1 - 1e-6:
        if k * max(rest) > 1 + 1e-6:
            with pytest.raises(PlanError, match=r"expected k \(1 - beta\) < 1"):
                plan(policy, current=current)
        return
    found = plan(policy, current=current)
    values = changed(found)
    assert sorted(values) == ["betas", "eps", "max_lr", "min_lr"]
    assert values["max_lr"] == pytest.approx(lr * k**0.5)
    assert values["min_lr"] == pytest.approx(lr / 10 * k**0.5)
    assert values["eps"] == pytest.approx(eps / k**0.5)
    for beta, was in zip(values["betas"], rest, strict=True):
        assert 1 - beta == pytest.approx(k * was, abs=1e-12)
    assert found.groups[0].values["weight_decay"] == 0.25
    assert found.clip_grad is None


@pytest.mark.parametrize("name", ["batch-size", "batch-sqrt"])
def test_batch_size_with_numbers(name: str) -> None:
    policy = ResumePolicy(preset=Preset(name, (256, 1024)))
    found = plan(policy, current=group(max_lr=1e-3, eps=1e-8, betas=(0.9, 0.95)))
    assert decision(found, "max_lr").value == 2e-3
    assert decision(found, "eps").value == 5e-9
    assert decision(found, "betas").value == pytest.approx((0.6, 0.8))
    assert decision(found, "max_lr").reason == f"preset {name} 256 1024: 0.001 x 2"
    assert decision(found, "betas").reason == f"preset {name} 256 1024: 1 - 4 (1 - beta)"


@pytest.mark.parametrize(
    ("old", "new", "betas"),
    [
        (1, 20, (0.99, 0.95)),
        (1, 10, (0.9, 0.999)),
        (1, 11, (0.9, 0.999)),
        (1, 1000, (0.9999, 0.999)),
        (2, 3, (0.0, 0.95)),
    ],
)
def test_a_beta_that_would_reach_0_is_refused_before_anything_is_loaded(
    old: int, new: int, betas: tuple[float, float]
) -> None:
    with pytest.raises(PlanError) as caught:
        plan(ResumePolicy(preset=Preset("batch-size", (old, new))), current=group(betas=betas))
    message = str(caught.value)
    assert message.startswith(f"preset for the batch size: with k = {new / old:g} a beta of ")
    assert message.endswith("expected k (1 - beta) < 1. Decline betas, or take a smaller ratio")


def test_declining_the_betas_is_the_way_out() -> None:
    preset = Preset("batch-size", (1, 20), ("betas",))
    found = plan(ResumePolicy(preset=preset), current=group(betas=(0.9, 0.95)))
    assert decision(found, "betas").value == (0.9, 0.95)
    assert decision(found, "max_lr").taken == "preset"


@given(s=st.floats(1e-6, 1e6), eps=st.floats(1e-12, 1e-3), clip=st.floats(1e-3, 100.0))
def test_gradient_scale_scales_eps_and_clipping(s: float, eps: float, clip: float) -> None:
    policy = ResumePolicy(preset=Preset("gradient-scale", (s,)))
    found = plan(policy, current=group(eps=eps), circumstances=Circumstances(clip_grad=clip))
    assert changed(found) == {"eps": eps * s}
    assert found.clip_grad is not None
    assert (found.clip_grad.taken, found.clip_grad.argument) == ("preset", clip)
    assert found.clip_grad.value == clip * s


def test_a_gradient_scale_whose_square_fp32_cannot_hold_is_refused() -> None:
    for s in (1e20, 1.9e19):
        with pytest.raises(PolicyError, match=r"preset gradient-scale .*: exp_avg_sq: factor is"):
            Preset("gradient-scale", (s,))
    assert Preset("gradient-scale", (1.8e19,)).effect.exp_avg_sq == Scale(1.8e19 * 1.8e19)


def test_without_clipping_there_is_nothing_to_scale() -> None:
    policy = ResumePolicy(preset=Preset("gradient-scale", (2.0,)))
    assert plan(policy, circumstances=Circumstances(clip_grad=0.0)).clip_grad is None


def test_gradient_scale_needs_decoupled_weight_decay() -> None:
    policy = ResumePolicy(preset=Preset("gradient-scale", (2.0,)))
    coupled = Circumstances(decoupled_weight_decay=False)
    with pytest.raises(PlanError, match=r"weight decay is coupled .*\[0\.1\]"):
        plan(policy, current=group(weight_decay=0.1), circumstances=coupled)
    found = plan(policy, current=group(weight_decay=0.0), circumstances=coupled)
    assert changed(found) == {"eps": 2e-8}
    assert changed(plan(ResumePolicy(), circumstances=coupled)) == {}


def test_gradient_scale_with_coupled_decay_looks_at_the_decay_that_is_kept() -> None:
    policy = ResumePolicy(
        preset=Preset("gradient-scale", (2.0,)), keep_hyperparameters=("weight_decay",)
    )
    coupled = Circumstances(decoupled_weight_decay=False)
    none, some = group(weight_decay=0.0), group(weight_decay=0.1)
    found = plan(policy, saved=none, current=some, circumstances=coupled)
    assert decision(found, "weight_decay").value == 0.0
    assert changed(found) == {"eps": 2e-8}
    with pytest.raises(PlanError, match=r"weight decay is coupled .*\[0\.1\]"):
        plan(policy, saved=some, current=none, circumstances=coupled)


@pytest.mark.parametrize("name", ["keep", "reset", "reset-momentum", "bias-consistent"])
def test_the_others_leave_the_hyperparameters_alone(name: str) -> None:
    found = plan(ResumePolicy(preset=Preset(name)))
    assert changed(found) == {}
    assert found.clip_grad is None


# --- from the arguments, never from the checkpoint


def test_derived_values_are_computed_from_the_arguments() -> None:
    policy = ResumePolicy(preset=Preset("batch-size", (256, 1024)))
    saved = group(max_lr=1.0, min_lr=1.0, eps=1.0, betas=(0.5, 0.5))
    current = group(max_lr=1e-3, min_lr=1e-4, eps=1e-8, betas=(0.9, 0.95))
    found = plan(policy, saved, current)
    assert changed(found) == {
        "max_lr": 1e-3 * 2.0,
        "min_lr": 1e-4 * 2.0,
        "eps": 1e-8 * 0.5,
        "betas": pytest.approx((0.6, 0.8)),
    }
    for key in ("max_lr", "min_lr", "eps", "betas"):
        assert (decision(found, key).checkpoint, decision(found, key).argument) == (
            saved[key],
            current[key],
        )


def test_a_second_start_with_the_same_command_line_computes_the_same() -> None:
    policy = ResumePolicy(preset=Preset("batch-size", (256, 1024)))
    once = plan(policy)
    again = plan(policy, saved=once.groups[0].values)
    assert again.groups[0].values == once.groups[0].values


def test_what_is_kept_from_the_checkpoint_does_not_follow() -> None:
    policy = ResumePolicy(("eps",), preset=Preset("batch-size", (256, 1024)))
    found = plan(policy, group(eps=1e-6), group(eps=1e-8))
    assert (decision(found, "eps").value, decision(found, "eps").taken) == (1e-6, "checkpoint")
    assert sorted(changed(found)) == ["betas", "max_lr", "min_lr"]


def test_a_running_optimizers_hyperparameters_are_left_alone() -> None:
    policy = ResumePolicy(preset=Preset("gradient-scale", (2.0,)))
    found = plan(policy, circumstances=Circumstances(clip_grad=1.0, live=True))
    assert (changed(found), found.clip_grad) == ({}, None)


def test_what_another_optimizer_updates_is_left_alone() -> None:
    policy = ResumePolicy(preset=Preset("batch-size", (256, 1024)), step="reset")
    (muon,) = (row for row in TABLE if row.name == "Muon")
    found = plan(policy, circumstances=Circumstances(optimizer=muon))
    assert (changed(found), found.step) == ({}, 100)
    (soap,) = (row for row in TABLE if row.name == "SOAP")
    found = plan(policy, circumstances=Circumstances(optimizer=soap))
    assert (changed(found), found.step) == ({}, 0)  # SOAP has a bias correction


# --- declining


@pytest.mark.parametrize(
    ("preset", "left"),
    [
        (Preset("batch-size", (1, 4), ("lr",)), ["betas", "eps"]),
        (Preset("batch-size", (1, 4), ("eps", "lr")), ["betas"]),
        (Preset("batch-size", (1, 4), ("betas",)), ["eps", "max_lr", "min_lr"]),
        (Preset("batch-size", (1, 4), ("exp_avg_sq",)), ["betas", "eps", "max_lr", "min_lr"]),
        (Preset("gradient-scale", (2,), ("eps",)), []),
        (Preset("gradient-scale", (2,), ("clip_grad",)), ["eps"]),
    ],
)
def test_declined_parts_stay_as_the_arguments_say(preset: Preset, left: list[str]) -> None:
    found = plan(ResumePolicy(preset=preset))
    assert sorted(changed(found)) == left
    values = found.groups[0].values
    for key in {"max_lr", "min_lr", "betas", "eps"} - set(left):
        assert values[key] == group()[key]
    clips = preset.name == "gradient-scale" and "clip_grad" not in preset.decline
    assert (found.clip_grad is not None) is clips


def test_the_experimental_part_can_be_declined_by_itself() -> None:
    with_it, without_it = (Preset("batch-size", (1, 4), d) for d in ((), ("exp_avg_sq",)))
    assert with_it.effect.exp_avg_sq == BatchRatio(4.0)
    assert without_it.effect.exp_avg_sq == KEEP
    assert without_it.effect.changes == with_it.effect.changes
    assert "experimental" in CATALOGUE["batch-size"].what


def test_what_is_declined_is_known() -> None:
    preset = Preset("batch-size", (1, 4), ("lr", "eps"))
    assert [c.key for c in preset.declined] == ["max_lr", "min_lr", "eps"]
    assert KEEP_ALL.declined == ()


# --- as they are written


@given(numbers=st.tuples(*[st.floats(1e-300, 1e300)] * 2))
def test_a_preset_is_written_so_that_no_digit_is_lost(numbers: tuple[float, float]) -> None:
    assume(0.0 < numbers[1] / numbers[0] < math.inf)
    preset = Preset("batch-size", numbers)
    name, *words = str(preset).split()
    assert Preset(name, tuple(words)) == preset  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("preset", "text"),
    [
        (Preset(), "keep"),
        (Preset("batch-size", (256, 1024.0)), "batch-size 256 1024"),
        (Preset("batch-size", ("1048576", "4194304")), "batch-size 1048576.0 4194304.0"),  # type: ignore[arg-type]
        (Preset("relora", (0.9,)), "relora 0.9"),
    ],
)
def test_a_preset_as_text(preset: Preset, text: str) -> None:
    assert str(preset) == text


@pytest.mark.parametrize(
    ("name", "numbers", "decline", "message"),
    [
        ("rest", (), (), "unknown preset 'rest'; did you mean 'reset'? Presets: keep, reset, "),
        ("batchsize", (1, 4), (), "did you mean 'batch-size'?"),
        ("warm", (), (), "unknown preset 'warm'; Presets: keep"),
        (["reset"], (), (), "unknown preset ['reset']"),
        ("reset", (1,), (), "preset reset: expected 'reset', found 'reset 1'"),
        ("gradient-scale", (), (), "expected 'gradient-scale S', found 'gradient-scale'"),
        ("gradient-scale", (0,), (), "preset gradient-scale: expected numbers above 0, found [0]"),
        ("gradient-scale", (-2,), (), "expected numbers above 0"),
        ("gradient-scale", (True,), (), "expected 'gradient-scale S'"),
        ("gradient-scale", ("two",), (), "found 'gradient-scale two'"),
        ("gradient-scale", (math.nan,), (), "expected 'gradient-scale S'"),
        ("gradient-scale", (None,), (), "expected 'gradient-scale S'"),
        ("gradient-scale", (1e200,), (), "Scale.factor is inf"),
        ("batch-size", (4,), (), "expected 'batch-size OLD NEW', found 'batch-size 4'"),
        ("batch-size", (0, 4), (), "expected numbers above 0"),
        ("batch-size", (1, math.inf), (), "expected 'batch-size OLD NEW'"),
        ("relora", (1.5,), (), "prune: expected a fraction from 0 to 1, found 1.5"),
        ("relora", (-1,), (), "prune: expected a fraction from 0 to 1, found -1.0"),
        ("reset", (), ("lr",), "preset reset: 'lr' cannot be declined; it changes nothing"),
        (
            "gradient-scale",
            (2,),
            ("lr", "eps"),
            "preset gradient-scale: 'lr' cannot be declined; it changes eps, clip_grad",
        ),
    ],
)
def test_what_is_no_preset_is_refused(
    name: Any, numbers: tuple[Any, ...], decline: tuple[str, ...], message: str
) -> None:
    with pytest.raises(PolicyError) as caught:
        Preset(name, numbers, decline)
    assert message in str(caught.value)
