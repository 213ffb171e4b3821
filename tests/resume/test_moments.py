"""Counting what came back, and refusing a resume that brought no moments."""

from __future__ import annotations

import pytest
import torch

from megatron_ext.errors import CheckpointError
from megatron_ext.host.optimizers import TABLE
from megatron_ext.report.loaded import LoadedState
from megatron_ext.rules.form import MOMENTS


def shard(*shape: int) -> dict[str, torch.Tensor]:
    return {k: torch.zeros(shape) for k in ("param", "exp_avg", "exp_avg_sq")}


def test_every_tensor_and_element_is_counted() -> None:
    loaded = LoadedState()
    loaded.add(shard(2, 3))
    loaded.add(shard(5))
    assert loaded.tensors == {"param": 2, "exp_avg": 2, "exp_avg_sq": 2}
    assert loaded.elements == {"param": 11, "exp_avg": 11, "exp_avg_sq": 11}


def test_the_step_and_what_is_no_tensor_do_not_count() -> None:
    loaded = LoadedState()
    loaded.add({"step": torch.tensor(3.0), "padding": True, "exp_avg": torch.zeros(4)})
    assert loaded.tensors == {"exp_avg": 1}
    assert loaded.elements == {"exp_avg": 4}


def test_an_empty_shard_is_a_tensor_without_elements() -> None:
    loaded = LoadedState()
    loaded.add(shard(0))
    assert loaded.tensors["exp_avg"] == 1
    assert loaded.elements["exp_avg"] == 0
    with pytest.raises(CheckpointError):
        loaded.require_moments()


def test_without_ranks_the_sum_is_the_count_with_a_zero_for_what_is_missing() -> None:
    loaded = LoadedState(tensors={"exp_avg": 2}, elements={"exp_avg": 11})
    summed = loaded.summed()
    assert summed.tensors == {"param": 0, "exp_avg": 2, "exp_avg_sq": 0}
    assert summed.elements == {"param": 0, "exp_avg": 11, "exp_avg_sq": 0}


@pytest.mark.parametrize(
    ("elements", "named"),
    [
        ({}, "exp_avg and exp_avg_sq"),
        ({"param": 9}, "exp_avg and exp_avg_sq"),
        ({"exp_avg": 9}, "exp_avg_sq"),
        ({"exp_avg": 0, "exp_avg_sq": 9}, "exp_avg"),
    ],
)
def test_missing_moments_are_an_error_that_names_them(elements: dict[str, int], named: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        LoadedState(elements=elements).require_moments()
    assert str(caught.value).startswith(f"no element of {named} was loaded on any rank")
    assert "--no-load-optim" in str(caught.value)


def test_both_moments_are_enough() -> None:
    assert MOMENTS == ("exp_avg", "exp_avg_sq")
    loaded = LoadedState(elements={"exp_avg": 1, "exp_avg_sq": 1})
    assert loaded.require_moments() is None  # type: ignore[func-returns-value]


def test_each_tensor_of_the_table_is_counted_and_the_others_together() -> None:
    rows = {row.name: row for row in TABLE}
    muon = LoadedState.of(rows["Muon"])
    muon.add({"param": torch.zeros(6), "momentum_buffer": torch.zeros(6), "step": torch.ones(1)})
    assert muon.elements == {"param": 6, "momentum_buffer": 6}
    soap = LoadedState.of(rows["SOAP"])
    state = {key: torch.zeros(4) for key in ("exp_avg", "exp_avg_sq", "L", "R")}
    soap.add({"param": torch.zeros(6), **state, "step": 3})
    assert soap.tensors == {"param": 1, "exp_avg": 1, "exp_avg_sq": 1, "state": 2}
    for loaded in (muon, soap):
        assert loaded.require_moments() is None  # type: ignore[func-returns-value]
    with pytest.raises(CheckpointError, match="no element of momentum_buffer was loaded"):
        LoadedState.of(rows["Muon"]).require_moments()


def test_elements_that_are_not_finite_are_summed_too() -> None:
    summed = LoadedState(nonfinite=3, proven=5, differing=7).summed()
    assert (summed.nonfinite, summed.proven, summed.differing) == (3, 5, 7)


def test_two_counts_do_not_share_their_numbers() -> None:
    one, other = LoadedState(), LoadedState()
    one.add(shard(2))
    assert other.tensors == other.elements == {}
