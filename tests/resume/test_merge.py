"""Merging: what the stock loader is handed, and what the live groups are given afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.checkpoint.state import read_optimizer
from megatron_ext.errors import CheckpointError
from megatron_ext.plan.decisions import ResumePlan
from megatron_ext.plan.hyperparameters import plan_resume
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.resume.merge import (
    hyperparameters,
    merge_distributed,
    merge_replicated,
    write_groups,
)
from tests.support.groups import DISTINCT, LISTS, STEPS, group, without


class Tensor:
    """Stands for a tensor: must be passed on, never copied or compared."""

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self


def planned(state_dict: dict[str, Any], live: list[dict[str, Any]], *keep: str) -> ResumePlan:
    return plan_resume(ResumePolicy(keep), read_optimizer(state_dict), live)


def saved_groups(groups: list[dict[str, Any]], step: int | None) -> list[dict[str, Any]]:
    steps = {} if step is None else {"step": step}
    return [{**g, "params": [i], **steps} for i, g in enumerate(groups)]


# --- DistributedOptimizer


@given(saved=LISTS, live=LISTS, step=STEPS)
def test_distributed_hands_over_the_live_groups_and_the_saved_step(
    saved: list[dict[str, Any]], live: list[dict[str, Any]], step: int | None
) -> None:
    shards = Tensor()
    state_dict = {
        "optimizer": {"param_groups": saved_groups(saved, step)},
        "param_state": shards,
        "param_state_sharding_type": "fully_sharded_model_space",
    }
    live_groups = [{**g, "params": [Tensor()], "step": 1} for g in live]
    before = copy.deepcopy((state_dict, live_groups))

    merged = merge_distributed(planned(state_dict, live_groups), state_dict, live_groups)

    assert merged["optimizer"]["param_groups"] == [
        g if step is None else {**g, "step": step} for g in live
    ]
    assert merged["param_state"] is shards
    assert set(merged) == set(state_dict)
    assert (state_dict, live_groups) == before


def test_the_merged_groups_are_not_the_live_ones() -> None:
    state_dict = {"optimizer": {"param_groups": saved_groups([group()], 3)}}
    live = [{**group(), "params": []}]
    merged = merge_distributed(planned(state_dict, live), state_dict, live)
    merged["optimizer"]["param_groups"][0]["eps"] = 1.0
    assert live[0]["eps"] == 1e-8
    assert state_dict["optimizer"]["param_groups"][0]["eps"] == 1e-8


# --- Float16Optimizer and FP32Optimizer


def replicated(
    groups: list[dict[str, Any]],
    ids: list[list[int]],
    step: int | None = 9,
    master_key: str = "fp32_from_fp16_params",
) -> dict[str, Any]:
    steps = {} if step is None else {"step": step}
    return {
        "optimizer": {
            "state": {i: {"exp_avg": Tensor(), "exp_avg_sq": Tensor()} for j in ids for i in j},
            "param_groups": [
                {**g, "params": list(i), **steps} for g, i in zip(groups, ids, strict=True)
            ],
        },
        master_key: [[f"master {i}" for i in group_ids] for group_ids in ids],
    }


@given(data=st.data(), groups=DISTINCT)
def test_legacy_ids_and_master_weights_follow_their_group(
    data: st.DataObject, groups: list[dict[str, Any]]
) -> None:
    sizes = [data.draw(st.integers(1, 3)) for _ in groups]
    order = data.draw(st.permutations(range(len(groups))))
    starts = [sum(sizes[:i]) for i in range(len(groups))]
    ids = [list(range(start, start + n)) for start, n in zip(starts, sizes, strict=True)]
    state_dict = replicated(groups, ids)
    live = [{**groups[i], "max_lr": 1.0, "eps": 1e-3, "params": []} for i in order]
    live_sizes = [sizes[i] for i in order]
    live_starts = [sum(live_sizes[:i]) for i in range(len(order))]
    live_ids = [list(range(s, s + n)) for s, n in zip(live_starts, live_sizes, strict=True)]
    before = copy.deepcopy(state_dict)

    merged = merge_replicated(
        planned(state_dict, live), state_dict, live, live_ids, ids_are_live=False
    )

    for place, i in enumerate(order):
        expected = {**groups[i], "max_lr": 1.0, "eps": 1e-3, "step": 9, "params": ids[i]}
        assert merged["optimizer"]["param_groups"][place] == expected
        assert merged["fp32_from_fp16_params"][place] == [f"master {j}" for j in ids[i]]
    assert merged["optimizer"]["state"] == state_dict["optimizer"]["state"]
    assert state_dict == before


def test_the_older_name_of_the_master_weights_is_reordered_too() -> None:
    state_dict = replicated([group(wd_mult=0.0), group()], [[0], [1, 2]], 9, "fp32_from_fp16")
    live = [group(), group(wd_mult=0.0)]
    merged = merge_replicated(
        planned(state_dict, live), state_dict, live, [[0, 1], [2]], ids_are_live=False
    )
    assert merged["fp32_from_fp16"] == [["master 1", "master 2"], ["master 0"]]
    assert [g["params"] for g in merged["optimizer"]["param_groups"]] == [[1, 2], [0]]


def test_the_fp32_optimizers_dict_is_merged_at_the_top() -> None:
    state_dict = replicated([group(wd_mult=0.0), group()], [[0], [1, 2]])["optimizer"]
    live = [group(eps=1.0), group(wd_mult=0.0, eps=1.0)]
    merged = merge_replicated(
        planned(state_dict, live), state_dict, live, [[0, 1], [2]], ids_are_live=False
    )
    assert set(merged) == {"state", "param_groups"}
    assert [(g["params"], g["eps"], g["step"]) for g in merged["param_groups"]] == [
        ([1, 2], 1.0, 9),
        ([0], 1.0, 9),
    ]


def test_with_live_ids_nothing_is_reordered_and_groups_may_come_and_go() -> None:
    state_dict = replicated([group(wd_mult=0.0)], [[0, 1, 2]])
    state_dict["fp32_from_fp16_params"] = [["a", "b"], ["c"]]
    live = [group(), group(wd_mult=0.0)]
    merged = merge_replicated(
        planned(state_dict, live), state_dict, live, [[0, 1], [2]], ids_are_live=True
    )
    assert [g["params"] for g in merged["optimizer"]["param_groups"]] == [[0, 1], [2]]
    assert merged["fp32_from_fp16_params"] == [["a", "b"], ["c"]]


def test_torch_adams_step_stays_in_the_state() -> None:
    state_dict = replicated([group()], [[0]], step=None)
    state_dict["optimizer"]["state"][0]["step"] = 9
    live = [group()]
    merged = merge_replicated(planned(state_dict, live), state_dict, live, [[0]], ids_are_live=True)
    assert "step" not in merged["optimizer"]["param_groups"][0]
    assert merged["optimizer"]["state"][0]["step"] == 9


def test_a_loader_that_consumes_the_merged_state_leaves_the_saved_one_whole() -> None:
    # `Float16OptimizerWithFloat16Params.load_state_dict` pops common_step and writes steps.
    state_dict = replicated([group()], [[0]], step=None)
    state_dict["optimizer"]["state"]["common_step"] = 9
    before = copy.deepcopy(state_dict)
    live = [group()]
    merged = merge_replicated(planned(state_dict, live), state_dict, live, [[0]], ids_are_live=True)
    state = merged["optimizer"]["state"]
    state[0]["step"] = state.pop("common_step")
    assert state_dict == before
    assert state[0]["exp_avg"] is state_dict["optimizer"]["state"][0]["exp_avg"]


def test_legacy_groups_with_nemos_names_are_paired() -> None:
    def nemo(wd_mult: float) -> dict[str, Any]:
        return {**without(group(), "wd_mult"), "pre_wd_mult": wd_mult}

    state_dict = replicated([nemo(0.0), nemo(1.0)], [[0, 1], [2, 3]])
    live = [group(), group(wd_mult=0.0)]
    merged = merge_replicated(
        planned(state_dict, live), state_dict, live, [[0, 1], [2, 3]], ids_are_live=False
    )
    assert [g["params"] for g in merged["optimizer"]["param_groups"]] == [[2, 3], [0, 1]]
    assert all("pre_wd_mult" not in g for g in merged["optimizer"]["param_groups"])


@pytest.mark.parametrize(
    ("saved", "saved_ids", "live", "live_ids"),
    [
        pytest.param([group()], [[0, 1]], [group()], [[0]], id="another-number-of-parameters"),
        pytest.param([group()], [[0]], [group(wd_mult=0.0)], [[0]], id="another-structure"),
        pytest.param(
            [group(), group(wd_mult=0.0)], [[0], [1]], [group()], [[0]], id="a-group-is-gone"
        ),
        pytest.param(
            [group()], [[0]], [group(), group(wd_mult=0.0)], [[0], [1]], id="a-group-is-new"
        ),
        pytest.param(
            [group(max_lr=1.0), group(max_lr=2.0)],
            [[0], [1]],
            [group(max_lr=2.0), group(max_lr=1.0)],
            [[0], [1]],
            id="twins-of-one-size",
        ),
    ],
)
def test_legacy_groups_that_cannot_be_paired_are_refused(
    saved: list[dict[str, Any]],
    saved_ids: list[list[int]],
    live: list[dict[str, Any]],
    live_ids: list[list[int]],
) -> None:
    state_dict = replicated(saved, saved_ids)
    plan = planned(state_dict, live)
    with pytest.raises(CheckpointError) as caught:
        merge_replicated(plan, state_dict, live, live_ids, ids_are_live=False)
    message = str(caught.value)
    assert f"saved groups hold {[len(i) for i in saved_ids]} parameters" in message
    assert f"the current ones {[len(i) for i in live_ids]}" in message
    assert "--ckpt-format torch_dist" in message


# --- the live groups


@given(wanted=DISTINCT, live=LISTS)
def test_written_groups_are_exactly_what_was_wanted(
    wanted: list[dict[str, Any]], live: list[dict[str, Any]]
) -> None:
    count = min(len(wanted), len(live))
    wanted, live = wanted[:count], live[:count]
    params = [[Tensor()] for _ in live]
    groups = [
        {**g, "only_live": 1, "params": p, "step": 5} for g, p in zip(live, params, strict=True)
    ]
    identities = list(map(id, groups))
    before = copy.deepcopy(wanted)

    write_groups(wanted, groups)

    assert list(map(id, groups)) == identities
    for written, w, p in zip(groups, before, params, strict=True):
        assert written["params"] is p
        assert {k: v for k, v in written.items() if k != "params"} == {**w, "step": 5}
    assert wanted == before


def test_a_wrong_number_of_groups_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        write_groups([group()], [group(), group()])


def test_hyperparameters_leaves_out_params_and_step_only() -> None:
    assert hyperparameters({**group(), "params": [1], "step": 2}) == group()
