"""`ResumePolicy`: what it accepts, what it refuses and in which words."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from megatron_ext.errors import MegatronExtError, PolicyError
from megatron_ext.policy import ResumePolicy


def test_the_default_keeps_no_hyperparameter() -> None:
    policy = ResumePolicy()
    assert policy.keep_hyperparameters == ()
    assert policy.schedule == "args"
    assert policy.kept_keys == frozenset()
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
        ("step", "it always comes from the checkpoint"),
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
    assert policy.kept_keys == {
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
    assert policy.why_kept("max_lr") == "--selective-keep-hyperparameters max_lr"
    assert policy.why_kept("min_lr") == "--use-checkpoint-opt_param-scheduler"
