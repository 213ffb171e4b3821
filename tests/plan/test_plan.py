"""Planning: where every value comes from, with which counterpart, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.checkpoint.state import MARK_KEY, SavedOptimizer, read_optimizer
from megatron_ext.errors import MegatronExtError, PlanError
from megatron_ext.plan.decisions import Decision, ResumePlan
from megatron_ext.plan.groups import match_groups
from megatron_ext.plan.hyperparameters import plan_resume
from megatron_ext.policy.match import GroupRule, Match, MomentRule
from megatron_ext.policy.phase import Mark, Phase, decide
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import Preset
from megatron_ext.rules.elementwise import Scale
from tests.support.groups import (
    DISTINCT,
    GROUPS,
    KEEPS,
    LISTS,
    STEPS,
    group,
    structure,
    without,
)
from tests.support.policy_strategies import POLICIES


def plan(
    saved: list[dict[str, Any]],
    current: list[dict[str, Any]],
    *keep: str,
    step: int | None = 100,
    schedule: Any = "args",
) -> ResumePlan:
    return plan_resume(ResumePolicy(keep, schedule), SavedOptimizer(tuple(saved), step), current)


def decision(found: ResumePlan, key: str, index: int = 0) -> Decision:
    return next(d for d in found.groups[index].decisions if d.key == key)


# --- the default policy


@given(saved=LISTS, current=LISTS, step=STEPS)
def test_by_default_every_value_is_the_current_one_and_the_step_the_saved(
    saved: list[dict[str, Any]], current: list[dict[str, Any]], step: int | None
) -> None:
    found = plan(saved, current, step=step)
    assert [g.values for g in found.groups] == current
    assert [g.index for g in found.groups] == list(range(len(current)))
    assert {d.taken for g in found.groups for d in g.decisions} == {"arguments"}
    assert {d.reason for g in found.groups for d in g.decisions} == {"default"}
    assert found.step == step


@given(saved=LISTS, current=LISTS, keep=KEEPS)
def test_planning_changes_nothing_it_is_given(
    saved: list[dict[str, Any]], current: list[dict[str, Any]], keep: tuple[str, ...]
) -> None:
    before = copy.deepcopy((saved, current))
    with contextlib.suppress(PlanError):
        plan(saved, current, *keep)
    assert (saved, current) == before


def test_params_and_step_of_the_current_groups_are_ignored() -> None:
    found = plan([group()], [{**group(), "params": [object()], "step": 3}], step=100)
    assert found.groups[0].values == group()
    assert found.step == 100


def test_a_decision_shows_both_sides() -> None:
    found = plan([group(eps=1e-8)], [group(eps=1e-6)])
    assert decision(found, "eps") == Decision("eps", 1e-8, 1e-6, "arguments", "default")
    assert decision(found, "eps").value == 1e-6


@pytest.mark.parametrize(
    ("checkpoint", "argument", "changed"),
    [
        (1e-8, 1e-6, True),
        (1e-8, 1e-8, False),
        ([0.9, 0.95], (0.9, 0.95), False),
        ([0.9, 0.95], (0.9, 0.999), True),
        (1, 1.0, False),
        (None, 0.1, True),
        (0.1, torch.tensor(0.1, dtype=torch.float64), False),
    ],
)
def test_changed_compares_values_not_containers(
    checkpoint: Any, argument: Any, changed: bool
) -> None:
    taken = Decision("k", checkpoint, argument, "arguments", "default")
    kept = Decision("k", checkpoint, argument, "checkpoint", "kept")
    assert taken.value is argument
    assert taken.changed is changed
    assert kept.value is checkpoint
    assert kept.changed is False


def test_keys_only_the_checkpoint_has_are_dropped_unless_kept() -> None:
    saved = [group(amsgrad=True, start_wd=0.05)]
    assert plan(saved, [group()]).groups[0].dropped == ("amsgrad", "start_wd")
    found = plan(saved, [group()], "start_wd")
    assert found.groups[0].dropped == ("amsgrad",)
    assert found.groups[0].values == {**group(), "start_wd": 0.05}


# --- the digest


def written_out(found: ResumePlan) -> Any:
    """What a plan will do, compared without the package's help."""

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return (
        found.step,
        sorted(found.policy.keep_hyperparameters),
        found.policy.schedule,
        [
            (g.saved_index, sorted((d.key, d.taken, repr(plain(d.value))) for d in g.decisions))
            for g in found.groups
        ],
    )


@given(
    current=LISTS,
    saved=LISTS,
    others=st.tuples(LISTS, LISTS),
    steps=st.tuples(st.sampled_from((1, 2)), st.sampled_from((1, 2))),
)
def test_digests_are_equal_exactly_if_the_decisions_are(
    current: list[dict[str, Any]],
    saved: list[dict[str, Any]],
    others: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    steps: tuple[int, int],
) -> None:
    plans = [
        plan(s, c, step=step)
        for c in (current, others[0])
        for s in (saved, others[1])
        for step in steps
    ]
    told = [(p.digest(), written_out(p)) for p in plans]
    for digest, decisions in told:
        for other_digest, other_decisions in told:
            assert (digest == other_digest) is (decisions == other_decisions)


@given(current=LISTS, saved=LISTS, seed=st.integers(0, 1000))
def test_the_digest_does_not_depend_on_the_order_of_keys(
    current: list[dict[str, Any]], saved: list[dict[str, Any]], seed: int
) -> None:
    def shuffled(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        shuffle = random.Random(seed).sample
        return [{k: g[k] for k in shuffle(list(g), len(g))} for g in groups]

    assert plan(saved, current).digest() == plan(shuffled(saved), shuffled(current)).digest()


@given(current=LISTS, saved=LISTS, which=st.integers(0, 100), step=STEPS)
def test_the_digest_sees_every_value_and_the_step(
    current: list[dict[str, Any]], saved: list[dict[str, Any]], which: int, step: int | None
) -> None:
    before = plan(saved, current, step=step).digest()
    assert plan(saved, current, step=(step or 0) + 1).digest() != before
    changed = copy.deepcopy(current)
    changed[which % len(changed)]["added_key"] = 1
    assert plan(saved, changed, step=step).digest() != before


def test_the_digest_sees_what_is_kept_even_where_the_values_are_equal() -> None:
    digests = {
        plan([group()], [group()]).digest(),
        plan([group()], [group()], "eps").digest(),
        plan([group()], [group()], "betas").digest(),
        plan([group()], [group()], schedule="checkpoint").digest(),
    }
    assert len(digests) == 4


def test_the_digest_sees_what_is_done_to_the_moments_and_to_the_step() -> None:
    saved = SavedOptimizer((group(),), 100)
    policies = [
        ResumePolicy(),
        ResumePolicy(preset=Preset("reset-momentum")),
        ResumePolicy(preset=Preset("relora", (0.5,))),
        ResumePolicy(preset=Preset("relora", (0.25,))),
        ResumePolicy(step="reset"),
        ResumePolicy(step=1),
        ResumePolicy(rules=(MomentRule(Match("w"), Scale(2.0)),)),
        ResumePolicy(rules=(MomentRule(Match("w"), Scale(4.0)),)),
        ResumePolicy(rules=(MomentRule(Match("w", (1, None)), Scale(4.0)),)),
        ResumePolicy(nonfinite="keep"),
    ]
    digests = {plan_resume(p, saved, [group()]).digest() for p in policies}
    assert len(digests) == len(policies)


def test_the_digest_takes_lists_for_tuples_and_ignores_the_order_of_flags() -> None:
    one = plan([group()], [group(betas=(0.9, 0.99))], "eps", "max_lr")
    other = plan([group()], [group(betas=[0.9, 0.99])], "max_lr", "eps")
    assert one.digest() == other.digest()
    assert len(one.digest()) == 64
    assert int(one.digest(), 16) > 0


# --- keeping a key


@given(data=st.data(), groups=DISTINCT, keep=KEEPS)
def test_a_kept_value_is_the_structural_counterparts(
    data: st.DataObject, groups: list[dict[str, Any]], keep: tuple[str, ...]
) -> None:
    order = data.draw(st.permutations(range(len(groups))))
    current = [{**data.draw(GROUPS), **_structure_of(groups[i])} for i in order]
    found = plan(groups, current, *keep)
    for place, (i, now) in enumerate(zip(order, current, strict=True)):
        assert found.groups[place].saved_index == i
        assert found.groups[place].note == "same group"
        assert found.groups[place].values == {**now, **{k: groups[i][k] for k in keep}}
    assert found.unused_saved_groups == ()


def _structure_of(saved: dict[str, Any]) -> dict[str, Any]:
    return {k: saved[k] for k in ("is_expert_parallel", "wd_mult", "lr_mult", "is_decoupled_lr")}


@given(data=st.data(), saved=LISTS, current=LISTS, keep=KEEPS)
def test_the_order_of_the_saved_groups_does_not_matter(
    data: st.DataObject,
    saved: list[dict[str, Any]],
    current: list[dict[str, Any]],
    keep: tuple[str, ...],
) -> None:
    schedule = data.draw(st.sampled_from(("args", "checkpoint")))
    permuted = data.draw(st.permutations(saved))

    def values(groups: list[dict[str, Any]]) -> Any:
        try:
            return [g.values for g in plan(groups, current, *keep, schedule=schedule).groups]
        except PlanError:
            return "refused"

    assert values(list(permuted)) == values(saved)


@given(saved=LISTS, current=LISTS, keep=KEEPS)
def test_a_kept_value_comes_from_a_saved_group_of_the_same_structure(
    saved: list[dict[str, Any]], current: list[dict[str, Any]], keep: tuple[str, ...]
) -> None:
    try:
        found = plan(saved, current, *keep)
    except PlanError:
        return
    for planned, now in zip(found.groups, current, strict=True):
        fitting = [s for s in saved if structure(s) == structure(now)]
        for key in now:
            allowed = [s[key] for s in fitting] if key in keep and fitting else [now[key]]
            assert planned.values[key] in allowed


def test_a_kept_key_gives_its_reason() -> None:
    found = plan([group(eps=1e-8)], [group(eps=1e-6)], "eps")
    assert decision(found, "eps").reason == "--selective-keep-hyperparameters eps"
    assert decision(found, "eps").value == 1e-8
    assert decision(found, "betas").reason == "default"


def test_the_checkpoints_schedule_gives_its_reason_and_leaves_the_rest() -> None:
    saved = [group(max_lr=3e-3, min_lr=3e-4, lr=7e-4, weight_decay=0.1, eps=1e-8)]
    now = [group(max_lr=1e-3, min_lr=1e-4, lr=0.0, weight_decay=0.2, eps=1e-6)]
    found = plan(saved, now, schedule="checkpoint")
    assert found.groups[0].values == {
        **now[0],
        "max_lr": 3e-3,
        "min_lr": 3e-4,
        "lr": 7e-4,
        "weight_decay": 0.1,
    }
    assert decision(found, "max_lr").reason == "--use-checkpoint-opt_param-scheduler"


def test_a_0_dim_tensor_is_kept_as_a_number() -> None:
    saved = [group(lr=torch.tensor(0.5))]
    kept = decision(plan(saved, [group()], schedule="checkpoint"), "lr")
    assert kept.value == 0.5
    assert type(kept.value) is float


def test_two_saved_groups_that_fit_and_differ_in_the_kept_key_are_refused() -> None:
    saved = [group(eps=1e-8, max_lr=3e-3), group(eps=1e-9, max_lr=1e-3)]
    with pytest.raises(PlanError) as caught:
        plan(saved, [group(max_lr=5e-4, weight_decay=0.25)], "eps")
    message = str(caught.value)
    assert message.startswith("--selective-keep-hyperparameters eps: 2 saved param_groups fit")
    assert "differ in 'eps'" in message
    assert f"saved group 0: {saved[0]}" in message
    assert f"saved group 1: {saved[1]}" in message
    assert "'weight_decay': 0.25" in message
    assert "Leave out --selective-keep-hyperparameters eps" in message


def test_the_same_with_the_checkpoints_schedule_names_that_flag() -> None:
    saved = [group(max_lr=3e-3), group(max_lr=1e-3)]
    with pytest.raises(PlanError) as caught:
        plan(saved, [group()], schedule="checkpoint")
    assert "differ in 'max_lr'" in str(caught.value)
    assert "Leave out --use-checkpoint-opt_param-scheduler" in str(caught.value)


def test_two_saved_groups_that_fit_and_agree_are_no_problem() -> None:
    saved = [group(eps=1e-9, max_lr=3e-3), group(eps=1e-9, max_lr=1e-3)]
    found = plan(saved, [group(max_lr=2e-3), group(max_lr=4e-3)], "eps")
    assert [g.values["eps"] for g in found.groups] == [1e-9, 1e-9]
    assert [g.saved_index for g in found.groups] == [0, 1]
    assert found.groups[0].note == "one of 2 saved groups that fit, by order"


def test_a_key_that_one_of_two_fitting_groups_lacks_is_a_difference() -> None:
    saved = [group(start_wd=None), group()]
    with pytest.raises(PlanError, match="differ in 'start_wd'"):
        plan(saved, [group()], "start_wd")


def test_groups_are_never_matched_on_the_learning_rate_alone() -> None:
    saved = [group(max_lr=3e-4, eps=1e-8), group(max_lr=3e-3, eps=1e-9)]
    current = [group(max_lr=1e-4, eps=1e-7), group(max_lr=3e-4, eps=1e-7)]
    with pytest.raises(PlanError, match="differ in 'eps'"):
        plan(saved, current, "eps")
    swapped = [group(max_lr=3e-3, min_lr=1.0), group(max_lr=3e-4, min_lr=2.0)]
    with pytest.raises(PlanError, match="differ in 'eps'"):
        plan(saved, swapped, "eps")


def test_a_value_both_phases_share_tells_twins_apart() -> None:
    saved = [
        group(default_config=True, max_lr=3e-4, eps=1e-8),
        group(default_config=False, max_lr=3e-3, eps=1e-9),
    ]
    current = [group(default_config=False, max_lr=3e-4), group(default_config=True, max_lr=1e-4)]
    found = plan(saved, current, "eps")
    assert [g.values["eps"] for g in found.groups] == [1e-9, 1e-8]


def test_a_value_the_phase_change_touched_does_not_tell_twins_apart() -> None:
    saved = [
        group(betas=(0.9, 0.95), eps=1e-8),
        group(betas=(0.9, 0.99), eps=1e-9),
    ]
    current = [group(betas=(0.9, 0.99)), group(betas=(0.9, 0.999))]
    with pytest.raises(PlanError, match="differ in 'eps'"):
        plan(saved, current, "eps")


# --- keeping all keys, and exceptions for some groups


def test_all_keys_from_the_checkpoint_but_those_that_are_taken() -> None:
    saved = group(max_lr=3e-3, eps=1e-8, betas=(0.9, 0.99), lr=7e-4, weight_decay=0.1)
    now = group(max_lr=1e-3, eps=1e-6, betas=(0.9, 0.95), lr=0.0, weight_decay=0.2)
    policy = ResumePolicy(hyperparameters="checkpoint", take_hyperparameters=("max_lr",))
    found = plan_resume(policy, SavedOptimizer((saved,), 100), [now])
    assert found.groups[0].values == {**saved, "max_lr": 1e-3, "lr": 0.0}
    assert decision(found, "eps").reason == "--selective-hyperparameters checkpoint"
    assert decision(found, "max_lr").reason == "--selective-take-hyperparameters max_lr"


@given(data=st.data(), groups=DISTINCT)
def test_from_the_checkpoint_each_group_is_its_counterpart_but_for_lr(
    data: st.DataObject, groups: list[dict[str, Any]]
) -> None:
    order = data.draw(st.permutations(range(len(groups))))
    current = [{**data.draw(GROUPS), **_structure_of(groups[i])} for i in order]
    policy = ResumePolicy(hyperparameters="checkpoint")
    found = plan_resume(policy, SavedOptimizer(tuple(groups), 1), current)
    for planned, i, now in zip(found.groups, order, current, strict=True):
        common = {k: groups[i][k] for k in now if k in groups[i] and k != "lr"}
        assert planned.values == {**now, **common}


def test_twins_are_told_apart_by_what_is_kept_as_one_of_all_keys() -> None:
    saved = [group(eps=1e-8, betas=(0.9, 0.95)), group(eps=1e-9, betas=(0.9, 0.99))]
    current = [group(betas=(0.9, 0.99), max_lr=1e-3), group(betas=(0.9, 0.95), max_lr=1e-3)]
    policy = ResumePolicy(hyperparameters="checkpoint")
    found = plan_resume(policy, SavedOptimizer(tuple(saved), 1), current)
    assert [g.values["eps"] for g in found.groups] == [1e-9, 1e-8]


def test_a_group_rule_decides_for_its_groups_only() -> None:
    saved = [group(eps=1e-8), group(eps=1e-9, is_expert_parallel=True)]
    current = [group(eps=1e-6), group(eps=1e-6, is_expert_parallel=True)]
    policy = ResumePolicy(groups=(GroupRule((("is_expert_parallel", True),), ("eps",)),))
    found = plan_resume(policy, SavedOptimizer(tuple(saved), 1), current)
    assert [g.values["eps"] for g in found.groups] == [1e-6, 1e-9]
    assert decision(found, "eps", 1).reason == "group rule 'is_expert_parallel=true'"


def test_a_group_rule_with_an_unknown_key_is_refused_with_a_suggestion() -> None:
    policy = ResumePolicy(groups=(GroupRule((("wd_mult", 1.0),), ("epss",)),))
    with pytest.raises(PlanError) as caught:
        plan_resume(policy, SavedOptimizer((group(),), 1), [group()])
    message = str(caught.value)
    assert message.startswith("group rule 'wd_mult=1.0': unknown key 'epss'")
    assert "Did you mean 'eps'?" in message


def test_a_key_to_be_taken_has_to_be_known_too() -> None:
    policy = ResumePolicy(take_hyperparameters=("beta",))
    with pytest.raises(PlanError, match=r"--selective-take-hyperparameters: unknown key 'beta'"):
        plan_resume(policy, SavedOptimizer((group(),), 1), [group()])


# --- step


@pytest.mark.parametrize(
    ("step", "saved", "after"),
    [
        (None, 100, 100),
        ("keep", 100, 100),
        ("reset", 100, 0),
        (7, 100, 7),
        (0, 100, 0),
        ("keep", None, None),
        ("reset", None, None),
    ],
)
def test_the_step_goes_on_as_the_policy_says(
    step: Any, saved: int | None, after: int | None
) -> None:
    found = plan_resume(ResumePolicy(step=step), SavedOptimizer((group(),), saved), [group()])
    assert (found.step, found.saved_step) == (after, saved)


def test_a_preset_that_resets_the_step_can_be_told_to_keep_it() -> None:
    saved = SavedOptimizer((group(),), 100)
    assert plan_resume(ResumePolicy(preset=Preset("reset")), saved, [group()]).step == 0
    kept = ResumePolicy(preset=Preset("reset"), step="keep")
    assert plan_resume(kept, saved, [group()]).step == 100


# --- groups without a counterpart


def test_an_added_group_takes_the_arguments_and_says_why() -> None:
    current = [group(eps=1e-6), group(eps=1e-5, wd_mult=0.0)]
    found = plan([group(eps=1e-8)], current, "eps")
    assert found.groups[0].values["eps"] == 1e-8
    added = decision(found, "eps", 1)
    assert (added.value, added.taken, added.checkpoint) == (1e-5, "arguments", None)
    assert added.reason == (
        "--selective-keep-hyperparameters eps, but the checkpoint has no such group (added since)"
    )
    assert found.groups[1].saved_index is None


def test_a_counterpart_without_the_kept_key_says_so() -> None:
    found = plan([without(group(), "eps")], [group(eps=1e-6)], "eps")
    assert decision(found, "eps").value == 1e-6
    assert decision(found, "eps").reason == (
        "--selective-keep-hyperparameters eps, but the saved group has no eps"
    )


def test_a_removed_group_is_named() -> None:
    saved = [group(wd_mult=0.0), group(), group(is_expert_parallel=True)]
    found = plan(saved, [group()])
    assert found.groups[0].saved_index == 1
    assert found.unused_saved_groups == (0, 2)


@given(saved=LISTS, current=LISTS)
def test_a_saved_group_is_used_or_named_as_unused(
    saved: list[dict[str, Any]], current: list[dict[str, Any]]
) -> None:
    found = plan(saved, current)
    used = {g.saved_index for g in found.groups} - {None}
    assert sorted(used | set(found.unused_saved_groups)) == list(range(len(saved)))
    assert not used & set(found.unused_saved_groups)


# --- what identifies a group


def test_nemos_names_find_the_counterpart() -> None:
    def nemo(wd_mult: float, eps: float) -> dict[str, Any]:
        plain = without(group(eps=eps), "wd_mult", "lr_mult")
        return {**plain, "pre_wd_mult": wd_mult, "pre_lr_mult": 1.0}

    saved = read_optimizer({"optimizer": {"param_groups": [nemo(0.0, 1e-9), nemo(1.0, 1e-8)]}})
    current = [group(wd_mult=1.0), group(wd_mult=0.0)]
    found = plan_resume(ResumePolicy(("eps",)), saved, current)
    assert [g.values["eps"] for g in found.groups] == [1e-8, 1e-9]


@pytest.mark.parametrize("missing", ["is_expert_parallel", "wd_mult", "lr_mult", "is_decoupled_lr"])
def test_a_structural_key_an_older_megatron_did_not_write_has_its_default(missing: str) -> None:
    other = {"is_expert_parallel": True, "wd_mult": 0.0, "lr_mult": 0.1, "is_decoupled_lr": True}
    saved = [group(eps=1e-9, **{missing: other[missing]}), without(group(), missing)]
    found = plan(saved, [group(eps=1e-6)], "eps")
    assert found.groups[0].saved_index == 1
    assert found.groups[0].values["eps"] == 1e-8


def test_a_group_of_another_inner_optimizer_is_another_group() -> None:
    found = plan([group(optimizer="muon", eps=1e-9), group()], [group(eps=1e-6)], "eps")
    assert found.groups[0].saved_index == 1


# --- unknown keys


def test_an_unknown_key_is_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(PlanError) as caught:
        plan([group()], [group(foreach=False)], "beta", "eps", "weigth_decay")
    message = str(caught.value)
    assert "unknown key 'beta', 'weigth_decay'" in message
    assert message.endswith(
        "Known keys: betas, bias_correction, default_config, end_wd, eps, foreach, "
        "is_decoupled_lr, is_expert_parallel, lr_mult, max_lr, min_lr, start_wd, wd_mult, "
        "weight_decay"
    )


@pytest.mark.parametrize("key", ["start_wd", "end_wd"])
def test_a_key_only_the_scheduler_has_is_known(key: str) -> None:
    found = plan([group()], [group()], key)
    assert found.groups[0].values == group()


# --- pairing by position (legacy, non-distributed)


def test_match_groups_pairs_by_structure_whatever_the_order() -> None:
    saved = [group(wd_mult=0.0), group()]
    current = [group(max_lr=1.0), group(max_lr=1.0, wd_mult=0.0)]
    assert match_groups(saved, current, [3, 5], [5, 3]) == [1, 0]


def test_match_groups_uses_the_sizes_only_between_twins() -> None:
    twins = [group(max_lr=1e-3), group(max_lr=1e-4)]
    assert match_groups(twins, twins[::-1], [3, 5], [5, 3]) == [1, 0]
    assert match_groups(twins, twins, [4, 4], [4, 4]) == [None, None]


def test_match_groups_never_gives_one_saved_group_away_twice() -> None:
    assert match_groups([group()], [group(), group()], [3], [3, 3]) == [None, None]
    assert match_groups([group()], [group(wd_mult=0.0)], [3], [3]) == [None]


# --- phases


def phase_plan(policy: ResumePolicy, phase: Phase, saved: SavedOptimizer) -> ResumePlan:
    return plan_resume(phase.policy, saved, [group(wd_mult=w) for w in (0.0, 1.0)], phase=phase)


@given(policy=POLICIES)
def test_a_phase_that_goes_on_has_the_hyperparameters_it_began_with_and_the_saved_step(
    policy: ResumePolicy,
) -> None:
    saved = SavedOptimizer(tuple(group(wd_mult=w, eps=1e-6) for w in (0.0, 1.0)), 100)
    begun = decide(policy, None, "phase1@10#00")
    try:
        first = phase_plan(policy, begun, saved)
    except MegatronExtError:
        return
    if first.mark is None:
        return
    again = phase_plan(policy, decide(policy, Mark.parse(first.mark), "x@12#11", "own"), saved)
    assert again.continued
    assert not first.continued
    assert [g.values for g in again.groups] == [g.values for g in first.groups]
    assert again.clip_grad == first.clip_grad
    assert (again.step, again.saved_step) == (100, 100)
    assert again.mark == first.mark
    assert again.digest() != first.digest()


def test_ranks_that_took_a_checkpoint_for_different_phases_do_not_agree() -> None:
    saved = SavedOptimizer((group(),), 100)
    policy = ResumePolicy(step=0)
    one, other = (decide(policy, None, source) for source in ("a@10#00", "b@10#11"))
    digests = [plan_resume(policy, saved, [group()], phase=p).digest() for p in (one, other, one)]
    assert digests[0] == digests[2] != digests[1]
    assert plan_resume(policy, saved, [group()]).mark is None


def test_a_mark_is_no_hyperparameter() -> None:
    """It is neither kept nor taken, and groups of different phases are the same group."""
    current = {**group(), MARK_KEY: "of the running phase"}
    found = plan_resume(
        ResumePolicy(hyperparameters="checkpoint"), SavedOptimizer((group(),), 1), [current]
    )
    assert MARK_KEY not in found.groups[0].values
    assert found.groups[0].saved_index == 0
    with pytest.raises(PlanError, match=f"unknown key {MARK_KEY!r}"):
        plan([group()], [current], MARK_KEY)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [((None, None), None), (("m", None), "m"), ((None, "m"), "m"), (("m", "m"), "m")],
)
def test_a_group_that_was_added_since_has_no_mark(
    marks: tuple[str | None, str | None], expected: str | None
) -> None:
    groups = [group(**({} if m is None else {MARK_KEY: m})) for m in marks]
    saved = read_optimizer({"param_groups": groups})
    assert saved.mark == expected
    assert all(MARK_KEY not in g for g in saved.groups)


def test_groups_of_two_phases_are_an_error() -> None:
    groups = [{**group(), MARK_KEY: m} for m in ("m", "n")]
    with pytest.raises(
        MegatronExtError, match=r"disagree about megatron_ext_phase: found \['m', 'n"
    ):
        read_optimizer({"param_groups": groups})
