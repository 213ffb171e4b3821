"""Rows that a checkpoint does not have: where they are on a rank, and what is said of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.state import SavedOptimizer
from megatron_ext.errors import CheckpointError
from megatron_ext.plan.cautions import fresh_update
from megatron_ext.plan.decisions import ResumePlan
from megatron_ext.plan.hyperparameters import plan_resume
from megatron_ext.plan.resized import ResizedParameter, RowChange, warnings_of
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.report.model import OptimizerReport
from megatron_ext.report.resume_report import ResumeReport
from megatron_ext.resume import vocabulary
from megatron_ext.resume.session import Resume
from tests.support.groups import group
from tests.support.reports import LOADED
from tests.support.reports import optimizer_report as plain_report

BETAS = (0.9, 0.95)
NAME = "embedding.word_embeddings.weight"


class Entry(SimpleNamespace):
    """As much of a ShardedTensor as is looked at."""


def entry(
    data: Any, rows: int, offset: int = 0, key: str = NAME, flexible: bool = True, extra: int = 0
) -> Entry:
    shape = (1,) * extra + (rows, *data.shape[1:])
    return Entry(
        key=key,
        data=data,
        allow_shape_mismatch=flexible,
        prepend_axis_num=extra,
        global_shape=shape,
        global_offset=(0,) * extra + (offset,) + (0,) * (data.dim() - 1),
        local_shape=tuple(data.shape),
    )


def find(
    state_dict: Any,
    stored: dict[str, tuple[int, ...] | None],
    rows: vocabulary.RowChanges | None = None,
) -> vocabulary.Resized:
    rows = vocabulary.RowChanges() if rows is None else rows
    return vocabulary.find_resized(state_dict, Entry, "optimizer.", lambda: stored, rows)


def weight(rows: int = 4) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.arange(1.0, 3.0 * rows + 1).view(rows, 3))


@pytest.mark.parametrize(
    ("saved", "offset", "first"), [(10, 8, 2), (8, 8, 0), (5, 8, 0), (12, 8, 4), (2, 0, 2)]
)
def test_the_first_new_row_of_a_shard(saved: int, offset: int, first: int) -> None:
    data, rows = weight(), vocabulary.RowChanges()
    found = find({"model": {"w": entry(data, 16, offset)}}, {NAME: (saved, 3)}, rows)
    change = rows.of(data)
    assert change == RowChange(NAME, saved, 16, first)
    assert rows.first_new_element(data) == (first * 3 if first < 4 else None)
    loaded = torch.zeros(4, 3)
    found.put_back({"model": {"w": loaded}})
    assert torch.equal(loaded[first:], data[first:])
    assert not loaded[:first].any()
    rows.clear()
    assert rows.of(data) is None
    assert not rows


def test_what_is_put_back_is_what_was_there_before_the_load() -> None:
    data = weight()
    before = data.detach().clone()
    found = find({"m": [entry(data, 4)]}, {NAME: (3, 3)})
    data.detach().zero_()
    found.put_back({"m": [data.detach()]})
    assert torch.equal(data[3:], before[3:])
    assert not data[:3].any()


def test_prepended_axes_are_no_rows() -> None:
    data, rows = weight(), vocabulary.RowChanges()
    find({"w": entry(data, 4, extra=1)}, {NAME: (1, 3, 3)}, rows)
    change = rows.of(data)
    assert change is not None
    assert (change.saved, change.now, change.first_new) == (3, 4, 3)


@pytest.mark.parametrize(
    ("stored", "flexible"),
    [((4, 3), True), ((3, 3), False), ((3, 2), True), ((3,), True), (None, True)],
    ids=["the same", "not flexible", "other columns", "other dimensions", "no tensor"],
)
def test_what_is_no_change_of_rows(stored: Any, flexible: bool) -> None:
    data, rows = weight(), vocabulary.RowChanges()
    found = find({"w": entry(data, 4, flexible=flexible)}, {NAME: stored}, rows)
    assert (found.changes, found.kept) == ([], [])
    assert not rows


def test_metadata_is_read_for_flexible_entries_only() -> None:
    def read() -> Any:
        raise AssertionError

    state_dict = {"w": entry(weight(), 4, flexible=False), "plain": 1}
    rows = vocabulary.RowChanges()
    found = vocabulary.find_resized(state_dict, Entry, "optimizer.", read, rows)
    assert (found.changes, found.kept) == ([], [])


def test_only_live_master_weights_are_kept_from_an_optimizers_entries() -> None:
    key = "optimizer.state.fp32_param." + NAME
    master, buffer, moment = (torch.ones(4, 3) for _ in range(3))
    state_dict = {
        "fp32_from_fp16_params": [[entry(master, 4, key=key)]],
        "param_state": {0: {"fp32_param": entry(buffer, 4, key=key)}},
        "state": {0: {"exp_avg": entry(moment, 4, key="optimizer.state.exp_avg." + NAME)}},
    }
    stored: dict[str, tuple[int, ...] | None] = dict.fromkeys(
        (key, "optimizer.state.exp_avg." + NAME), (3, 3)
    )
    found = find(state_dict, stored)
    assert [path for path, _, _ in found.kept] == [("fp32_from_fp16_params", 0, 0)]
    assert found.changes == []


def test_every_load_finds_out_for_itself() -> None:
    resume, data = Resume(), weight()
    resume.join(optimizer := object())
    find({"w": entry(data, 4)}, {NAME: (3, 3)}, resume.enter("allocate", optimizer).rows)
    assert resume.load is not None
    assert resume.load.rows.of(data) == RowChange(NAME, 3, 4, 3)
    assert not resume.enter("allocate", optimizer).rows


def test_buckets_are_refused_by_name() -> None:
    found = find({"w": entry(weight(), 4)}, {NAME: (3, 3)})
    bucket = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_x.bucket_idx_0.param"
    for key, form in ((bucket, "dp_reshardable"), ("optimizer.distributed.x.param_state", "gath")):
        error = vocabulary.unsupported(found, {key: None})
        assert isinstance(error, CheckpointError)
        assert form in str(error)
    assert vocabulary.unsupported(found, {"optimizer.state.exp_avg.x": None}) is None
    assert vocabulary.unsupported(vocabulary.Resized(), {bucket: None}) is None


def plan(step: int | None = 100, policy: ResumePolicy = ResumePolicy()) -> ResumePlan:  # noqa: B008
    current = [group(betas=BETAS)]
    return plan_resume(policy, SavedOptimizer(tuple(current), step), current)


def test_the_warning_has_the_number_and_the_remedy() -> None:
    (text,) = warnings_of(plan(), [ResizedParameter(NAME, 64, 96, bare=32)])
    assert "the moments of 32 new rows are 0 while step stays at 100" in text
    assert f"{fresh_update(BETAS, 100):.2f} lr" in text
    assert f"--selective-rule '{NAME}[64:]' reset 'fill column-mean'" in text


def test_without_bare_rows_or_with_a_new_step_there_is_no_warning() -> None:
    assert list(warnings_of(plan(), [ResizedParameter(NAME, 64, 96)])) == []
    bare = [ResizedParameter(NAME, 64, 96, bare=32)]
    assert list(warnings_of(plan(step=None), bare)) == []
    assert list(warnings_of(plan(policy=ResumePolicy(step="reset")), bare)) == []


def test_dropped_rows_are_a_warning() -> None:
    (text,) = warnings_of(plan(), [ResizedParameter(NAME, 96, 64)])
    assert "the 32 rows [64:] of the checkpoint are dropped" in text


def test_the_report_tells_new_rows() -> None:
    stock = plain_report()
    resized = (ResizedParameter(NAME, 64, 96), ResizedParameter("output_layer.weight", 96, 64))
    one = OptimizerReport(stock.kind, stock.plan, LOADED, stock.parameters, resized=resized)
    report = ResumeReport("0.19.2", [one])
    wanted = (
        f" > {NAME}: 64 rows in the checkpoint, 96 now: the weights of the 32 new rows [64:] stay "
        "as initialised"
    )
    assert wanted in report.lines()
    assert not any("output_layer" in line for line in report.lines())
    assert report.to_json()["optimizers"][0]["resized"] == [
        {
            "parameter": NAME,
            "checkpoint_rows": 64,
            "rows": 96,
            "new_rows": 32,
            "dropped_rows": 0,
        },
        {
            "parameter": "output_layer.weight",
            "checkpoint_rows": 96,
            "rows": 64,
            "new_rows": 0,
            "dropped_rows": 32,
        },
    ]
