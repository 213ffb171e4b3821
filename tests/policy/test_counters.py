"""The counters' arithmetic: each can be reset by itself, and a restart changes none of them."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.policy.counters import Counters, begin, last_iteration, ramp_of, samples_needed
from megatron_ext.policy.policy import ResumePolicy
from tests.support.policy_strategies import POLICIES

#: Ten iterations of 8 samples.
SAVED = Counters(10, 80, 3, 40, 80)

COUNTERS = st.builds(
    Counters,
    st.integers(0, 10**6),
    st.integers(0, 10**9),
    st.integers(0, 100),
    st.integers(0, 10**6),
    st.none() | st.integers(0, 10**9),
)
BATCHES = st.integers(1, 4096)


def after(counters: Counters, iterations: int, batch: int) -> Counters:
    """What a training loop makes of the counters: the definition, written out once more."""
    for_each = iterations * batch
    return replace(
        counters,
        iteration=counters.iteration + iterations,
        consumed_train_samples=counters.consumed_train_samples + for_each,
        num_steps=None if counters.num_steps is None else counters.num_steps + for_each,
    )


@pytest.mark.parametrize(
    ("asked", "iteration", "data", "schedule", "offset"),
    [
        ({}, 10, 80, 80, 0),
        ({"reset_iteration": True}, 0, 80, 0, 80),
        ({"reset_iteration": True, "schedule_position": "continue"}, 0, 80, 80, 80),
        ({"reset_dataloader": True}, 10, 0, 80, -80),
        ({"reset_dataloader": True, "schedule_position": "restart"}, 10, 0, 0, -80),
        ({"schedule_position": "restart"}, 10, 80, 0, 0),
        ({"reset_iteration": True, "reset_dataloader": True}, 0, 0, 0, 0),
        (
            {"reset_iteration": True, "reset_dataloader": True, "schedule_position": "continue"},
            *(0, 0, 80, 0),
        ),
    ],
)
def test_each_counter_is_reset_by_itself(
    asked: dict[str, Any], iteration: int, data: int, schedule: int, offset: int
) -> None:
    skipped, valid = (0, 0) if "reset_dataloader" in asked else (3, 40)
    found = begin(ResumePolicy(**asked), SAVED, 0)
    assert found == (Counters(iteration, data, skipped, valid, schedule), offset)


def test_without_a_scheduler_there_is_no_position_to_reset() -> None:
    found, _ = begin(ResumePolicy(reset_iteration=True), replace(SAVED, num_steps=None), 0)
    assert found == Counters(0, 80, 3, 40, None)


def test_each_phase_adds_to_the_offset() -> None:
    """Three phases of 10 iterations: of 8 samples, of 4 with a new count, of 4 with new data."""
    second, offset = begin(ResumePolicy(reset_iteration=True), SAVED, 0)
    assert offset == 80
    third, offset = begin(ResumePolicy(reset_dataloader=True), after(second, 10, 4), offset)
    assert (third.iteration, third.consumed_train_samples, offset) == (10, 0, -40)
    fourth, offset = begin(ResumePolicy(reset_iteration=True), after(third, 10, 4), offset)
    assert (fourth.iteration, fourth.consumed_train_samples, offset) == (0, 40, 40)


@given(policy=POLICIES, saved=COUNTERS, offset=st.integers(-(10**9), 10**9))
def test_a_restart_takes_all_counters_as_they_are(
    policy: ResumePolicy, saved: Counters, offset: int
) -> None:
    assert begin(policy.without_operations(), saved, offset) == (saved, offset)


@given(policy=POLICIES, saved=COUNTERS, offset=st.integers(-(10**9), 10**9))
def test_the_offset_is_what_the_data_is_ahead_of_the_count(
    policy: ResumePolicy, saved: Counters, offset: int
) -> None:
    begun, new = begin(policy, saved, offset)
    counted = 0 if policy.reset_iteration else saved.consumed_train_samples - offset
    assert begun.consumed_train_samples == counted + new
    assert begun.iteration == (0 if policy.reset_iteration else saved.iteration)


@given(
    policy=POLICIES,
    saved=COUNTERS,
    old=BATCHES,
    batch=BATCHES,
    more=st.integers(0, 10**7),
    done=st.floats(0.0, 1.0),
)
def test_a_restart_at_any_later_point_ends_at_the_same_iteration_and_needs_the_same_samples(
    policy: ResumePolicy, saved: Counters, old: int, batch: int, more: int, done: float
) -> None:
    saved = replace(saved, consumed_train_samples=saved.iteration * old)
    begun, offset = begin(policy, saved, 0)
    train_samples = begun.consumed_train_samples - offset + more
    last = last_iteration(begun, offset, train_samples, batch)
    needed = samples_needed(begun, last, batch)
    # As many whole batches as the samples that are left give.
    assert begun.iteration + more // batch == last
    later = after(begun, round(done * (last - begun.iteration)), batch)
    assert last_iteration(later, offset, train_samples, batch) == last
    assert samples_needed(later, last, batch) == needed
    end = after(begun, last - begun.iteration, batch)
    assert end.consumed_train_samples == needed


@given(saved=COUNTERS, batch=BATCHES, fewer=st.integers(0, 10**6))
def test_a_run_that_is_past_its_end_goes_no_further(
    saved: Counters, batch: int, fewer: int
) -> None:
    samples = max(0, saved.consumed_train_samples - fewer)
    assert last_iteration(saved, 0, samples, batch) == saved.iteration
    last = max(0, saved.iteration - fewer)
    assert samples_needed(saved, last, batch) == saved.consumed_train_samples


@given(iterations=st.integers(0, 10**6), batch=BATCHES, more=st.integers(0, 10**6))
def test_a_run_whose_counters_agree_ends_where_stock_ends(
    iterations: int, batch: int, more: int
) -> None:
    """update_train_iters: train_samples // global_batch_size (training/training.py, 0.19.2)."""
    counters = after(Counters(0, 0, num_steps=0), iterations, batch)
    samples = iterations * batch + more
    last = last_iteration(counters, 0, samples, batch)
    assert last == samples // batch
    assert samples_needed(counters, last, batch) == last * batch


def test_a_changed_batch_size_by_hand() -> None:
    """192 samples, 80 of them in 10 iterations of 8: 7 more of 16, 28 more of 4."""
    assert last_iteration(SAVED, 0, 192, 16) == 17
    assert last_iteration(SAVED, 0, 192, 4) == 38
    begun, offset = begin(ResumePolicy(reset_iteration=True), SAVED, 0)
    assert last_iteration(begun, offset, 192, 16) == 12
    assert samples_needed(begun, 12, 16) == 80 + 192
    fresh, offset = begin(ResumePolicy(reset_dataloader=True), SAVED, 0)
    assert last_iteration(fresh, offset, 192, 16) == 17
    assert samples_needed(fresh, 17, 16) == 7 * 16


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ({}, None),
        ({"rampup_batch_size": None, "step_batch_size_schedule": None}, None),
        ({"rampup_batch_size": ["4", "2", "40"]}, "rampup_batch_size"),
        ({"step_batch_size_schedule": "0:4 100:8"}, "step_batch_size_schedule"),
    ],
    ids=["no such flag", "not given", "a ramp", "steps"],
)
def test_a_batch_size_that_changes(arguments: dict[str, object], found: str | None) -> None:
    assert ramp_of(SimpleNamespace(**arguments)) == found
