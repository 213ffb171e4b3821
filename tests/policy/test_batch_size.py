"""The global batch size at a position, against Megatron's own calculator."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_ext.policy.batch_size import batch_size_at

STEPS: dict[str, Any] = {"global_batch_size": 2, "seq_length": 16}


@pytest.mark.parametrize("schedule", ["0:4 640:8", "0:4,0.64K:8 1.6k:16", "1M:32 0:4", "0:8"])
def test_a_schedule_has_the_batch_size_that_megatron_computes(schedule: str) -> None:
    module = pytest.importorskip("megatron.core.num_microbatches_calculator")
    if not hasattr(module, "StepBatchsizeNumMicroBatchesCalculator"):
        pytest.skip("--step-batch-size-schedule came with megatron-core 0.18")
    theirs = module.StepBatchsizeNumMicroBatchesCalculator(2, 1, False, 1, schedule, 16)
    for consumed in (0, 39, 40, 41, 99, 100, 62499, 62500, 10**9):
        theirs.update(consumed, consistency_check=False)
        found = batch_size_at({**STEPS, "step_batch_size_schedule": schedule}, consumed)
        assert found == theirs.get_current_global_batch_size()


@pytest.mark.parametrize(
    ("args", "found"),
    [
        ({"global_batch_size": 8}, 8),
        ({"global_batch_size": 8, "step_batch_size_schedule": None}, 8),
        ({"global_batch_size": None}, None),
        ({}, None),
        ({"global_batch_size": 8, "rampup_batch_size": ["4", "2", "40"]}, None),
        ({"global_batch_size": 8, "decrease_batch_size_if_needed": True}, None),
        ({"global_batch_size": 8, "step_batch_size_schedule": "0:4"}, None),
        ({**STEPS, "step_batch_size_schedule": "4"}, None),
        ({**STEPS, "step_batch_size_schedule": "9K:4"}, None),
        ({**STEPS, "seq_length": 0, "step_batch_size_schedule": "0:4"}, None),
    ],
)
def test_a_constant_size_and_one_that_is_not_known(args: dict[str, Any], found: int | None) -> None:
    assert batch_size_at(args, 80) == found
