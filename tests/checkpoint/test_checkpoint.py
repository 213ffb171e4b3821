"""What is read of a saved optimizer, and what is said when something is missing."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.state import does_not_fit, misfits, optimizer_section, read_optimizer
from megatron_ext.errors import CheckpointError
from tests.support.groups import group

GROUPS = [{"params": [0], "eps": 1e-8}]


@pytest.mark.parametrize("key", ["optimizer", "optimizer_state_dict"])
def test_the_nested_section_is_found(key: str) -> None:
    section = {"param_groups": GROUPS}
    found_key, found = optimizer_section({"grad_scaler": {}, key: section})
    assert found_key == key
    assert found is section


def test_the_fp32_optimizers_state_dict_is_its_own_section() -> None:
    state_dict = {"state": {}, "param_groups": GROUPS}
    assert optimizer_section(state_dict) == (None, state_dict)


@pytest.mark.parametrize("state_dict", [{}, {"optimizer": None}, {"optimizer": {"state": {}}}])
def test_a_checkpoint_without_optimizer_state_names_what_it_has(
    state_dict: dict[str, Any],
) -> None:
    with pytest.raises(CheckpointError) as caught:
        optimizer_section(state_dict)
    assert "holds no optimizer state" in str(caught.value)
    assert f"found the keys {sorted(state_dict)}" in str(caught.value)
    assert "--no-load-optim" in str(caught.value)


def test_params_and_step_are_no_hyperparameters_and_nothing_is_modified() -> None:
    state_dict = {"optimizer": {"param_groups": [{**group(), "params": [0, 1], "step": 7}]}}
    before = copy.deepcopy(state_dict)
    saved = read_optimizer(state_dict)
    assert saved.groups == (group(),)
    assert saved.step == 7
    assert state_dict == before


@pytest.mark.parametrize(
    ("group_steps", "state", "step"),
    [
        ((5, 5), {}, 5),  # TE, apex
        ((None, 5), {}, 5),  # a group without parameters on this rank
        ((None, None), {0: {"step": torch.tensor(6.0)}, 1: {"step": torch.tensor(6.0)}}, 6),
        ((None, None), {"common_step": torch.tensor(8.0)}, 8),  # torch_dist of torch's AdamW
        ((None, None), {0: {"exp_avg": 1.0}}, None),
        ((None, None), None, None),
        ((0, 0), {}, 0),
    ],
)
def test_the_step_is_found_wherever_the_inner_optimizer_keeps_it(
    group_steps: tuple[int | None, ...], state: Any, step: int | None
) -> None:
    groups = [{**group(), "params": [], "step": s} for s in group_steps]
    found = read_optimizer({"optimizer": {"param_groups": groups, "state": state}}).step
    assert found == step
    assert found is None or type(found) is int


@pytest.mark.parametrize(
    "section",
    [
        {"param_groups": [{"step": 5}, {"step": 9}]},
        {"param_groups": [{"step": 9}], "state": {0: {"step": torch.tensor(5.0)}}},
        {"param_groups": [{}], "state": {"common_step": 5, 0: {"step": 9}}},
    ],
)
def test_steps_that_disagree_are_an_error(section: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"disagree about step: found \[5, 9\]"):
        read_optimizer({"optimizer": section})


@pytest.mark.parametrize(
    "step", [-1, -1.0, 2.5, math.inf, -math.inf, math.nan, 1e30, 2**31, "three", True]
)
@pytest.mark.parametrize("where", ["group", "parameter", "common"])
def test_a_step_that_adam_cannot_have_taken_is_an_error(step: Any, where: str) -> None:
    kept = torch.tensor(float(step)) if isinstance(step, float) else step
    section: dict[str, Any] = {
        "group": {"param_groups": [{"step": step}]},
        "parameter": {"param_groups": [{}], "state": {0: {"step": kept}}},
        "common": {"param_groups": [{}], "state": {"common_step": kept}},
    }[where]
    with pytest.raises(CheckpointError, match=r"step is .*expected a whole number from 0 to"):
        read_optimizer({"optimizer": section})


def test_no_groups_at_all_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="no param_groups: nothing can be resumed"):
        read_optimizer({"optimizer": {"param_groups": []}})


def test_nemos_names_are_read_as_megatrons() -> None:
    saved = read_optimizer({"param_groups": [{"pre_wd_mult": 0.0, "pre_lr_mult": 0.1, "eps": 1}]})
    assert saved.groups == ({"wd_mult": 0.0, "lr_mult": 0.1, "eps": 1},)


def test_megatrons_name_wins_over_nemos() -> None:
    saved = read_optimizer({"param_groups": [{"pre_wd_mult": 0.0, "wd_mult": 1.0}]})
    assert saved.groups[0]["wd_mult"] == 1.0


def test_misfits_names_each_key_that_does_not_fit() -> None:
    requested = {"a": [4, 2], "b": (3,), "c": None, "d": [5], "e": [6], "f": None}
    saved = {"a": (4, 2), "b": [7], "c": [1], "d": None, "z": [9]}
    assert misfits(requested, saved) == [
        "b: the checkpoint has shape (7,), the model (3,)",
        "e: not in the checkpoint",
        "f: not in the checkpoint",
    ]


def test_misfits_of_what_fits_is_empty() -> None:
    assert misfits({"a": [2, 3]}, {"a": (2, 3), "more": [1]}) == []


def test_what_does_not_fit_is_listed_up_to_eight_lines_with_the_way_out() -> None:
    lines = [f"exp_avg.{i}: not in the checkpoint" for i in range(10)]
    message = str(does_not_fit(lines))
    assert message.startswith("the checkpoint's optimizer state does not fit the model:\n")
    assert [i for i in range(10) if f"  exp_avg.{i}: not in" in message] == list(range(8))
    assert "\n  and 2 more\n" in message
    assert "--dist-ckpt-optim-fully-reshardable" in message
    assert "more\n" not in str(does_not_fit(lines[:8]))
