"""`ResumePolicy`: what it accepts, what it refuses and in which words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import MegatronExtError, PolicyError
from megatron_ext.policy.match import GroupRule, Match, MomentRule
from megatron_ext.policy.policy import SCHEDULER_ATTRIBUTES, ResumePolicy
from megatron_ext.policy.presets import Preset
from megatron_ext.rules.batch_size import BatchRatio
from megatron_ext.rules.elementwise import KEEP, Fill, Floor, Scale
from megatron_ext.rules.fill_from import FillFrom
from tests.support.groups import group
from tests.support.policy_strategies import MATCHES, POLICIES


def test_the_default_keeps_no_hyperparameter() -> None:
    policy = ResumePolicy()
    assert policy.keep_hyperparameters == ()
    assert policy.schedule == "args"
    assert policy.named_keys == ()
    assert {policy.source(key, group()) for key in group()} == {(False, "default")}
    assert policy.kept_scheduler_attributes == ()


def test_keys_become_a_tuple_without_repetitions_in_the_order_given() -> None:
    policy = ResumePolicy(keep_hyperparameters=["eps", "betas", "eps"])  # type: ignore[arg-type]
    assert policy.keep_hyperparameters == ("eps", "betas")
    assert policy == ResumePolicy(("eps", "betas"))


def test_a_policy_cannot_be_changed_after_it_was_validated() -> None:
    with pytest.raises(FrozenInstanceError):
        ResumePolicy().schedule = "checkpoint"  # type: ignore[misc]


@pytest.mark.parametrize("key", ["", "betas,eps", "adam-eps", "--eps", "a b", 1, None, ["eps"]])
def test_what_is_not_a_key_is_refused_by_name(key: Any) -> None:
    with pytest.raises(PolicyError) as caught:
        ResumePolicy(("eps", key))
    assert f"--selective-keep-hyperparameters: {key!r} is not a param_group key" in str(
        caught.value
    )


def test_one_string_is_not_taken_for_a_sequence_of_letters() -> None:
    with pytest.raises(PolicyError, match=r"found the string 'eps'; write \['eps'\]"):
        ResumePolicy("eps")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("params", "the parameters always are the current model's"),
        ("step", "step is state, not a hyperparameter: see --selective-step"),
        ("lr", "keep 'max_lr' and 'min_lr' instead"),
    ],
)
def test_keys_that_are_no_choice_are_refused_with_the_way_out(key: str, reason: str) -> None:
    with pytest.raises(PolicyError) as caught:
        ResumePolicy((key,))
    assert f"{key!r} cannot be kept" in str(caught.value)
    assert reason in str(caught.value)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(PolicyError, match="expected 'args' or 'checkpoint', found 'stock'"):
        ResumePolicy(schedule="stock")  # type: ignore[arg-type]


def test_a_policy_error_is_a_value_error_and_one_of_the_package() -> None:
    assert issubclass(PolicyError, ValueError)
    assert issubclass(PolicyError, MegatronExtError)


def test_the_checkpoints_schedule_keeps_what_the_scheduler_writes_or_reads() -> None:
    policy = ResumePolicy(("eps",), schedule="checkpoint")
    kept = {key for key in group(start_wd=0.1, end_wd=0.1) if policy.source(key, group())[0]}
    assert kept == {
        "eps",
        "lr",
        "max_lr",
        "min_lr",
        "weight_decay",
        "start_wd",
        "end_wd",
    }


@pytest.mark.parametrize(
    ("keep", "attributes"),
    [
        (("eps", "betas"), ()),
        (("max_lr",), ("max_lr",)),
        (("min_lr", "max_lr"), ("min_lr", "max_lr")),
        (("weight_decay",), ("start_wd", "end_wd", "wd_incr_steps", "wd_incr_style")),
        (
            ("end_wd", "weight_decay"),
            ("end_wd", "start_wd", "wd_incr_steps", "wd_incr_style"),
        ),
    ],
)
def test_the_scheduler_follows_kept_keys(
    keep: tuple[str, ...], attributes: tuple[str, ...]
) -> None:
    assert ResumePolicy(keep).kept_scheduler_attributes == attributes


def test_the_reason_names_the_flag_that_asked_for_it() -> None:
    policy = ResumePolicy(("max_lr",), schedule="checkpoint")
    assert policy.source("max_lr", group()) == (True, "--selective-keep-hyperparameters max_lr")
    assert policy.source("min_lr", group()) == (True, "--use-checkpoint-opt_param-scheduler")
    assert policy.source("eps", group()) == (False, "default")


# --- where a key comes from


def test_all_keys_can_come_from_the_checkpoint_but_some() -> None:
    policy = ResumePolicy(hyperparameters="checkpoint", take_hyperparameters=("max_lr", "eps"))
    kept = {key for key in group() if policy.source(key, group())[0]}
    assert kept == set(group()) - {"max_lr", "eps", "lr"}
    assert policy.source("betas", group()) == (True, "--selective-hyperparameters checkpoint")
    assert policy.source("eps", group()) == (False, "--selective-take-hyperparameters eps")
    assert policy.source("lr", group()) == (False, "default")
    assert "max_lr" not in policy.kept_scheduler_attributes
    assert set(policy.kept_scheduler_attributes) == {
        a for k, names in SCHEDULER_ATTRIBUTES.items() if k != "max_lr" for a in names
    }


EXPERTS = (("is_expert_parallel", True),)


def test_a_group_rule_decides_before_the_policys_own_keys() -> None:
    policy = ResumePolicy(("eps",), groups=(GroupRule(EXPERTS, ("max_lr",), ("eps",)),))
    expert, dense = group(is_expert_parallel=True), group()
    assert policy.source("max_lr", expert) == (True, "group rule 'is_expert_parallel=true'")
    assert policy.source("eps", expert) == (False, "group rule 'is_expert_parallel=true'")
    assert policy.source("max_lr", dense) == (False, "default")
    assert policy.source("eps", dense) == (True, "--selective-keep-hyperparameters eps")
    assert policy.named_keys == ("eps", "max_lr")


def test_group_rules_that_disagree_are_an_error_that_names_both() -> None:
    rules = (GroupRule(EXPERTS, ("eps",)), GroupRule((("lr_mult", 0.1),), (), ("eps",)))
    policy = ResumePolicy(groups=rules)
    with pytest.raises(PolicyError) as caught:
        policy.source("eps", group(is_expert_parallel=True, lr_mult=0.1))
    assert str(caught.value) == (
        "group rules 'is_expert_parallel=true' and 'lr_mult=0.1' disagree about 'eps': expected "
        "one to decide"
    )
    assert policy.source("eps", group(is_expert_parallel=True)) == (
        True,
        "group rule 'is_expert_parallel=true'",
    )
    assert policy.source("betas", group(is_expert_parallel=True, lr_mult=0.1)) == (False, "default")


def test_group_rules_that_agree_are_no_problem() -> None:
    rules = (GroupRule(EXPERTS, ("eps",)), GroupRule((("lr_mult", 0.1),), ("eps",)))
    both = group(is_expert_parallel=True, lr_mult=0.1)
    assert ResumePolicy(groups=rules).source("eps", both)[0] is True


@pytest.mark.parametrize(
    ("match", "found", "fits"),
    [
        ({"is_expert_parallel": True}, {"is_expert_parallel": True}, True),
        ({"is_expert_parallel": True}, {"is_expert_parallel": False}, False),
        ({"is_expert_parallel": False}, {}, False),
        ({"wd_mult": 1}, {"wd_mult": 1.0}, True),
        ({"wd_mult": "1e-3"}, {"wd_mult": 1e-3}, True),
        ({"start_wd": None}, {"start_wd": None}, True),
        ({"optimizer": "muon"}, {"optimizer": "muon"}, True),
        ({"optimizer": "muon"}, {"optimizer": "adam"}, False),
        ({"wd_mult": 1.0, "lr_mult": 0.1}, {"wd_mult": 1.0, "lr_mult": 1.0}, False),
        ({"wd_mult": 1.0, "lr_mult": 0.1}, {"wd_mult": 1.0, "lr_mult": 0.1}, True),
    ],
)
def test_a_group_fits_if_it_has_all_attributes(
    match: dict[str, Any], found: dict[str, Any], fits: bool
) -> None:
    assert GroupRule(match, ("eps",)).fits(found) is fits  # type: ignore[arg-type]
    assert Match(group=match).fits("any", 1, found) is fits  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupRule((), ("eps",)), "expected at least one attribute to match, found none"),
        (lambda: GroupRule(EXPERTS), "expected keys to keep or to take, found none"),
        (lambda: GroupRule(EXPERTS, ("eps",), ("eps",)), "eps both kept and taken"),
        (lambda: GroupRule(EXPERTS, ("lr",)), "keep 'max_lr' and 'min_lr' instead"),
        (lambda: GroupRule(EXPERTS, (), ("step",)), "see --selective-step"),
        (lambda: GroupRule(EXPERTS, "eps"), "found the string 'eps'; write ['eps']"),
        (lambda: GroupRule((("a", [1]),), ("eps",)), "a: expected a plain value, found [1]"),
        (lambda: GroupRule((("a", float("nan")),), ("eps",)), "expected a plain value, found nan"),
        (lambda: GroupRule((("a", 1), ("a", 2)), ("eps",)), "'a' is given twice; expected one"),
        (lambda: GroupRule((("a",),), ("eps",)), "expected KEY: VALUE pairs, found ('a',)"),
    ],
)
def test_a_group_rule_that_makes_no_sense_is_refused(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(PolicyError, match=re.escape(message)):
        make()


# --- which parameters


@given(match=MATCHES)
def test_a_match_without_blanks_is_read_back_from_its_text(match: Match) -> None:
    plain = all(
        re.fullmatch(r"[^\s=]+", k) and k != "ndim" and v != "" and not re.search(r"\s", str(v))
        for k, v in match.group
    )
    rows_at_its_end = re.search(r"\[\d*:\d*\]$", match.name) and match.rows is None
    if plain and not re.search(r"\s", match.name) and not rows_at_its_end:
        assert Match.parse(str(match)) == match


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("*", Match()),
        ("*.bias", Match("*.bias")),
        ("[3:]", Match("*", (3, None))),
        ("output_layer.weight[32000:]", Match("output_layer.weight", (32000, None))),
        ("output_layer.weight[:128]", Match("output_layer.weight", (None, 128))),
        ("w[3:5] ndim=2", Match("w", (3, 5), 2)),
        ("w[:]", Match("w", (None, None))),
        ("layer[0-9].w", Match("layer[0-9].w")),
        ("re:.*[.](weight|bias)", Match("re:.*[.](weight|bias)")),
        ("re:w[ab]{2}[1:2]", Match("re:w[ab]{2}", (1, 2))),
        (
            "* is_expert_parallel=true wd_mult=1e-3 optimizer=muon start_wd=none lr_mult=1",
            Match(
                "*",
                group=(
                    ("is_expert_parallel", True),
                    ("lr_mult", 1),
                    ("optimizer", "muon"),
                    ("start_wd", None),
                    ("wd_mult", 1e-3),
                ),
            ),
        ),
    ],
)
def test_a_match_as_text(text: str, match: Match) -> None:
    assert Match.parse(text) == match
    assert Match.parse(str(match)) == match


LAYER = "decoder.layers.12.mlp.linear_fc1.weight"


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("*", True),
        ("decoder.*", True),
        ("*.weight", True),
        ("decoder.layers.1.*", False),
        ("decoder.layers.1?.*", True),
        ("decoder.layers.[0-9][0-9].*.weight", True),
        ("layers.12", False),
        ("re:.*layers[.]1.[.].*", True),
        ("re:decoder", False),
        ("re:decoder.*|embedding.*", True),
        ("re:.*linear_fc[12].weight$", True),
    ],
)
def test_a_name_is_matched_as_a_whole(name: str, fits: bool) -> None:
    assert Match(name).fits(LAYER, 2, {}) is fits


def test_the_number_of_dimensions_counts() -> None:
    assert Match(ndim=1).fits("b", 1, {})
    assert not Match(ndim=1).fits("w", 2, {})
    assert Match(ndim=0).fits("s", 0, {})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Match("re:(a"),
            "match 're:(a': not a regular expression: missing ), unterminated subpattern at "
            "position 0; without 're:' it is a glob",
        ),
        (lambda: Match(""), "expected a parameter name or glob, found ''"),
        (lambda: Match(3), "expected a parameter name or glob, found 3"),
        (lambda: Match("w", (3, 3)), "match 'w': rows 3:3 are empty; expected A:B with A < B"),
        (lambda: Match("w", (5, 3)), "rows 5:3 are empty"),
        (lambda: Match("w", (None, 0)), "rows 0:0 are empty"),
        (lambda: Match("w", (-1, 3)), "rows (-1, 3): expected two numbers"),
        (lambda: Match("w", (1, 2, 3)), "expected two numbers, A and B of A:B"),
        (lambda: Match("w", (True, 3)), "expected two numbers"),
        (lambda: Match("w", ndim=-1), "match 'w': ndim is -1; expected 0, 1, 2"),
        (lambda: Match("w", ndim=True), "ndim is True"),
        (lambda: Match.parse(""), "match '': expected a parameter name or glob, found none"),
        (lambda: Match.parse("w bias"), "match 'w bias': expected KEY=VALUE, found 'bias'"),
        (lambda: Match.parse("w ndim=two"), "expected one ndim=NUMBER, found two"),
        (lambda: Match.parse("w ndim=1 ndim=2"), "expected one ndim=NUMBER, found 1, 2"),
        (lambda: Match.parse("w a=1 a=2"), "rule w: 'a' is given twice"),
        (lambda: Match.parse("w[4:4]"), "rows 4:4 are empty"),
    ],
)
def test_a_match_that_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(message)):
        make()


# --- rules for moments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MomentRule(Match(), KEEP, Scale(-1.0)), "rule *: 'scale -1.0' would make"),
        (lambda: MomentRule(Match(), KEEP, Fill(-1.0)), "'fill -1.0' would make"),
        (lambda: MomentRule(Match(), KEEP, Floor(-1.0)), "'floor -1.0' would make"),
        (lambda: MomentRule(Match("w"), BatchRatio(2.0)), "rule w: 'batch-size 2.0' is a rule for"),
        (lambda: MomentRule(Match(), FillFrom("median")), "exp_avg has two signs"),
        (lambda: MomentRule(Match(), Floor(1.0)), "'floor 1.0' is for exp_avg_sq"),
        (lambda: MomentRule(Match(), "reset"), "rule *: exp_avg: expected an operation of"),
        (lambda: MomentRule("*"), "rule: match: expected Match, found '*'"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(message)):
        make()


def test_a_rule_as_it_stands_in_messages() -> None:
    rule = MomentRule(Match("w", (3, None)), exp_avg_sq=FillFrom("mean"))
    assert str(rule) == "'w[3:]' (exp_avg: keep, exp_avg_sq: fill mean)"


# --- the rest of a policy


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"step": -1},
            "--selective-step: expected keep, reset or a number of at least 0, found -1",
        ),
        ({"step": "restart"}, "--selective-step: expected keep, reset or a number"),
        ({"step": 2**31}, "of at least 0 and at most 2147483647, found 2147483648"),
        ({"step": 10**400}, "of at least 0 and at most 2147483647, found 1000"),
        ({"step": True}, "found True"),
        ({"step": 1.5}, "found 1.5"),
        ({"nonfinite": "ignore"}, "expected 'error' or 'reset' or 'keep', found 'ignore'"),
        ({"master_weights": "args"}, "master_weights: expected 'checkpoint' or 'model'"),
        ({"hyperparameters": "both"}, "hyperparameters: expected 'args' or 'checkpoint'"),
        (
            {"keep_hyperparameters": ("eps",), "take_hyperparameters": ("eps", "betas")},
            "eps: in --selective-keep-hyperparameters (from the checkpoint) and in "
            "--selective-take-hyperparameters (from the arguments); expected one",
        ),
        ({"take_hyperparameters": ("lr",)}, "--selective-take-hyperparameters: 'lr' cannot be"),
        ({"preset": "reset"}, "preset: expected Preset, found 'reset'"),
        ({"rules": ("*",)}, "rules: expected MomentRule, found '*'"),
        ({"groups": (Match(),)}, "groups: expected GroupRule, found Match("),
        (
            {"schedule_position": "keep"},
            "schedule position: expected 'continue' or 'restart', found 'keep'",
        ),
        ({"grad_scaler": "restart"}, "grad_scaler: expected 'keep' or 'reset', found 'restart'"),
        ({"grad_scaler": None}, "grad_scaler: expected 'keep' or 'reset', found None"),
        ({"reset_iteration": 1}, "reset_iteration: expected true or false, found 1"),
        ({"reset_dataloader": None}, "reset_dataloader: expected true or false, found None"),
        ({"phase": "second phase"}, "--selective-phase: expected letters, digits, '.', '_' and"),
        ({"phase": "b\n"}, "--selective-phase: expected letters, digits"),
        ({"phase": "\u03b2"}, "found '\u03b2'"),
        ({"phase": 2}, "--selective-phase: expected letters, digits, '.', '_' and '-', found 2"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(message)):
        ResumePolicy(**fields)


@given(
    step=st.sampled_from((None, "keep", "reset", 0, 7)), preset=st.sampled_from(("keep", "reset"))
)
def test_a_step_that_is_given_goes_before_the_presets(step: Any, preset: str) -> None:
    policy = ResumePolicy(preset=Preset(preset), step=step)
    assert policy.next_step == (preset if step is None else step)


def test_whether_any_moment_is_changed() -> None:
    assert not ResumePolicy(("eps",), step="reset").changes_moments
    assert not ResumePolicy(rules=(MomentRule(Match()),)).changes_moments
    assert ResumePolicy(preset=Preset("reset-momentum")).changes_moments
    assert ResumePolicy(rules=(MomentRule(Match("w"), KEEP, Scale(2.0)),)).changes_moments
    declined = Preset("batch-size", (1, 4), ("exp_avg_sq",))
    assert not ResumePolicy(preset=declined).changes_moments


@pytest.mark.parametrize("which", ["keep", "take"])
def test_weight_decay_is_no_choice_of_a_group(which: str) -> None:
    with pytest.raises(PolicyError, match="the scheduler computes it before every step"):
        GroupRule((("wd_mult", 1.0),), **{which: ("weight_decay",)})


# --- what must happen once

#: What a policy asks beside hyperparameters -> how it stands among its operations.
OPERATIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "nothing": ({}, ()),
    "hyperparameters": (
        {
            "keep_hyperparameters": ("eps",),
            "hyperparameters": "checkpoint",
            "groups": (GroupRule(EXPERTS, ("max_lr",)),),
            "schedule": "checkpoint",
        },
        (),
    ),
    "how to go about it": ({"nonfinite": "reset", "strict": False, "phase": "b"}, ()),
    "what changes nothing": (
        {"step": "keep", "schedule_position": "continue", "rules": (MomentRule(Match("w")),)},
        (),
    ),
    "master weights": ({"master_weights": "model"}, ("master weights from the model",)),
    "a preset": ({"preset": Preset("reset")}, ("preset reset",)),
    "a preset with declined hyperparameters": (
        {"preset": Preset("gradient-scale", (0.5,), ("eps",))},
        ("preset gradient-scale 0.5",),
    ),
    "a preset without its moments": ({"preset": Preset("batch-size", (1, 4), ("exp_avg_sq",))}, ()),
    "rules": (
        {
            "rules": (
                MomentRule(Match("w", (3, None)), Scale(0.5)),
                MomentRule(Match("b"), KEEP, FillFrom("mean")),
            )
        },
        (
            "rule 'b' (exp_avg: keep, exp_avg_sq: fill mean)",
            "rule 'w[3:]' (exp_avg: scale 0.5, exp_avg_sq: keep)",
        ),
    ),
    "a step": ({"step": 7}, ("step 7",)),
    "step 0": ({"step": 0}, ("step 0",)),
    "the iteration": ({"reset_iteration": True}, ("iteration reset", "schedule restart")),
    "the iteration, not the schedule": (
        {"reset_iteration": True, "schedule_position": "continue"},
        ("iteration reset",),
    ),
    "the data": ({"reset_dataloader": True}, ("data position reset",)),
    "the schedule": ({"schedule_position": "restart"}, ("schedule restart",)),
    "the loss scale": ({"grad_scaler": "reset"}, ("grad scaler reset",)),
}


@pytest.mark.parametrize("case", OPERATIONS)
def test_operations_are_what_must_not_be_done_twice(case: str) -> None:
    fields, operations = OPERATIONS[case]
    assert ResumePolicy(**fields).operations == operations


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, False),
        ({"take_hyperparameters": ("eps",), "nonfinite": "keep", "phase": "b"}, False),
        ({"groups": (GroupRule(EXPERTS, (), ("eps",)),)}, False),
        ({"keep_hyperparameters": ("eps",)}, True),
        ({"hyperparameters": "checkpoint"}, True),
        ({"groups": (GroupRule(EXPERTS, ("eps",)),)}, True),
        ({"step": 0}, True),
        ({"master_weights": "model"}, True),
        ({"reset_iteration": True, "schedule_position": "continue"}, True),
        ({"schedule_position": "continue"}, True),
        ({"grad_scaler": "reset"}, True),
        ({"preset": Preset("relora", (0.5,))}, True),
    ],
)
def test_whether_a_policy_needs_the_checkpoints_optimizer(
    fields: dict[str, Any], needs: bool
) -> None:
    assert ResumePolicy(**fields).needs_optimizer is needs


@pytest.mark.parametrize("asked", [None, "continue", "restart"])
@pytest.mark.parametrize("reset", [True, False])
def test_the_schedule_restarts_with_the_iteration_unless_something_else_is_asked(
    asked: Any, reset: bool
) -> None:
    policy = ResumePolicy(schedule_position=asked, reset_iteration=reset)
    assert policy.restarts_schedule is {None: reset, "continue": False, "restart": True}[asked]


@given(policy=POLICIES)
def test_what_is_left_of_a_policy_has_no_operation_and_the_same_hyperparameters(
    policy: ResumePolicy,
) -> None:
    left = policy.without_operations()
    assert left.operations == ()
    assert not left.changes_moments
    assert left.next_step == "keep"
    assert left.master_weights == "checkpoint"
    assert not left.restarts_schedule
    assert left.preset.effect.changes == policy.preset.effect.changes
    for key in group():
        try:
            expected = policy.source(key, group())
        except PolicyError:
            continue
        assert left.source(key, group()) == expected
    kept = ("nonfinite", "strict", "phase", "schedule", "kept_scheduler_attributes", "named_keys")
    assert all(getattr(left, name) == getattr(policy, name) for name in kept)
    assert left.without_operations() == left
