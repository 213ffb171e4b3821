"""A learning rate or weight decay that rises at a resume is told with both numbers."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ext.checkpoint.state import SavedOptimizer
from megatron_ext.plan.decisions import ResumePlan
from megatron_ext.plan.hyperparameters import plan_resume
from megatron_ext.plan.jumps import jumps
from megatron_ext.policy.policy import ResumePolicy
from tests.support.groups import group, without


def planned(*saved: dict[str, Any], **policy: Any) -> ResumePlan:
    current = [group(wd_mult=g["wd_mult"]) for g in saved]
    return plan_resume(ResumePolicy(**policy), SavedOptimizer(saved, 10), current)


def test_a_rate_after_the_end_of_the_schedule() -> None:
    plan = planned(group(lr=1e-5), group(lr=1e-5, wd_mult=0.0, weight_decay=0.0))
    (found,) = jumps(plan, {0: (6.3e-5, 0.1), 1: (6.3e-5, 0.0)})
    assert found.startswith(
        "the first resumed learning rate is 6.3e-05, 6.30x the last used one, 1e-05 (param_group "
        "0, 1), and the schedule does not begin again. "
    )
    assert "--lr-decay-iters" in found
    assert "--selective-schedule restart" in found


def test_every_pair_of_numbers_is_told_once() -> None:
    plan = planned(group(lr=1e-5), group(lr=1e-6, wd_mult=0.0), group(lr=1e-6, wd_mult=0.5))
    found = jumps(plan, {0: (1e-5, 0.4), 1: (4e-6, 0.1), 2: (4e-6, 0.1)})
    assert [text.partition(", and")[0] for text in found] == [
        "the first resumed learning rate is 4e-06, 4.00x the last used one, 1e-06 (param_group 1, "
        "2)",
        "the first resumed weight decay is 0.4, 4.00x the last used one, 0.1 (param_group 0)",
    ]


def test_weight_decay_that_begins() -> None:
    plan = planned(group(weight_decay=0.0))
    (found,) = jumps(plan, {0: (2e-3, 0.1)})
    assert "weight decay is 0.1, and the last was 0 (param_group 0)" in found


@pytest.mark.parametrize(
    ("saved", "first"),
    [
        (group(), (2e-3, 0.1)),
        (group(), (3e-3, 0.15)),  # 1.5x
        (group(), (1e-4, 0.01)),
        (group(lr=0.0), (2e-3, 0.1)),  # at the start of a warm-up
        (without(group(), "lr", "weight_decay"), (2e-1, 9.0)),
    ],
)
def test_what_does_not_rise_is_no_news(saved: dict[str, Any], first: tuple[float, float]) -> None:
    assert jumps(planned(saved), {0: first}) == ()


@pytest.mark.parametrize(
    "policy", [{"schedule_position": "restart"}, {"reset_iteration": True}], ids=str
)
def test_a_restart_that_was_asked_for_is_no_news(policy: dict[str, Any]) -> None:
    assert jumps(planned(group(lr=1e-5), **policy), {0: (1e-3, 0.1)}) == ()
    kept = {**policy, "schedule_position": "continue"}
    assert len(jumps(planned(group(lr=1e-5), **kept), {0: (1e-3, 0.1)})) == 1
