"""Every rank goes on or every rank stops, after one small collective."""

from __future__ import annotations

import functools
import operator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_ext.base.ranks import BYTES_PER_RANK, agree, device, stop_together, total
from megatron_ext.errors import PlanError
from tests.support.pool import RankPool

CASE = "tests.support.agree_cases:agree"
A, B, C = "a1" * 32, "b2" * 32, "c3" * 32

#: The successful case: one all_reduce of five int64.
ONE = [("all_reduce", 40)]
#: The failing one: a second collective brings the messages together.
TWO = [*ONE, ("all_gather_object", None)]


def test_without_ranks_nothing_is_compared() -> None:
    assert not agree("resume", A)
    assert agree("resume", A, flag=True)
    assert total([1, 2, 3]) == [1, 2, 3]


def test_without_ranks_an_error_is_raised_as_it_is() -> None:
    error = PlanError("no such key")
    with pytest.raises(PlanError) as caught:
        agree("resume", "", error)
    assert caught.value is error
    with pytest.raises(PlanError) as caught:
        stop_together("resume", error)
    assert caught.value is error
    stop_together("resume", None)


@pytest.mark.ranks
@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_same_plan_passes_on_every_rank(world: int, ext: RankPool) -> None:
    found = ext.run(CASE, world, digests=[A] * world)
    assert [f["raised"] for f in found] == [None] * world
    assert [f["calls"] for f in found] == [ONE if world > 1 else []] * world
    assert BYTES_PER_RANK == 40


@pytest.mark.ranks
def test_digests_of_the_largest_and_smallest_numbers_pass(ext: RankPool) -> None:
    for digest in ("f" * 64, "0" * 64):
        found = ext.run(CASE, 2, digests=[digest] * 2)
        assert [f["raised"] for f in found] == [None, None]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("digests", "camps"),
    [
        ([A, B], ["rank 0: plan a1a1a1a1a1a1", "rank 1: plan b2b2b2b2b2b2"]),
        ([A, B, A], ["ranks 0, 2: plan a1a1a1a1a1a1", "rank 1: plan b2b2b2b2b2b2"]),
        (
            [A, B, C],
            [
                "rank 0: plan a1a1a1a1a1a1",
                "rank 1: plan b2b2b2b2b2b2",
                "rank 2: plan c3c3c3c3c3c3",
            ],
        ),
    ],
)
def test_another_plan_stops_every_rank_and_names_the_camps(
    digests: list[str], camps: list[str], ext: RankPool
) -> None:
    world = len(digests)
    found = ext.run(CASE, world, digests=digests)
    expected = (
        f"resume of X: the ranks made {len(camps)} different plans:\n"
        + "\n".join(f"  {camp}" for camp in camps)
        + "\nGive every rank the same arguments, files and checkpoint"
    )
    assert [f["raised"] for f in found] == [("AgreementError", expected)] * world
    assert [f["calls"] for f in found] == [TWO] * world
    assert [f["after"] for f in found] == [[sum(range(world)), world]] * world


@pytest.mark.ranks
def test_what_differs_is_named_with_every_value(ext: RankPool) -> None:
    facts = [{"step": "4", "lr": "0.1"}, {"step": "4", "lr": "0.2"}, {"step": "4", "lr": "0.1"}]
    found = ext.run(CASE, 3, digests=[A, B, A], facts=facts)
    expected = (
        "resume of X: the ranks made 2 different plans:\n  lr: 0.1 on ranks 0, 2, 0.2 on rank 1\n"
        "Give every rank the same arguments, files and checkpoint"
    )
    assert [f["raised"] for f in found] == [("AgreementError", expected)] * 3
    assert [f["calls"] for f in found] == [TWO] * 3


@pytest.mark.ranks
def test_ranks_that_do_not_come_are_named(ext: RankPool) -> None:
    case = "tests.support.agree_cases:await_everyone"
    assert ext.run(case, 3, seconds=20.0, absent=[]) == [None] * 3
    found = ext.run(case, 3, seconds=0.5, absent=[1, 2])
    assert found[1:] == [None, None]
    kind, message = found[0]
    assert kind == "AgreementError"
    assert message.startswith("meeting: waited 0.5 s for ranks 1, 2 of 3. They run without")


@pytest.mark.ranks
@pytest.mark.parametrize("position", [0, 14, 15, 29])
def test_every_compared_digit_counts(position: int, ext: RankPool) -> None:
    other = A[:position] + "7" + A[position + 1 :]
    found = ext.run(CASE, 2, digests=[A, other])
    assert [f["raised"][0] for f in found] == ["AgreementError"] * 2


@pytest.mark.ranks
@pytest.mark.parametrize(("world", "failing"), [(2, 0), (2, 1), (3, 1), (3, 2)])
def test_one_rank_that_refuses_stops_every_rank_in_its_own_words(
    world: int, failing: int, ext: RankPool
) -> None:
    found = ext.run(CASE, world, digests=[A] * world, errors={failing: "no such key: 'beta'"})
    expected = (
        f"resume of X: stopped because 1 of {world} ranks refused:\n"
        f"  rank {failing}: PlanError: no such key: 'beta'"
    )
    for rank, result in enumerate(found):
        if rank == failing:
            assert result["raised"] == ("PlanError", "no such key: 'beta'")
            assert result["own"] is True
        else:
            assert result["raised"] == ("AgreementError", expected)
        assert result["calls"] == TWO
        assert result["after"] == [sum(range(world)), world]


@pytest.mark.ranks
def test_a_refusal_is_seen_even_where_the_digests_are_equal(ext: RankPool) -> None:
    # A failing rank has no digest of its own and stands in with zeros.
    found = ext.run(CASE, 2, digests=["0" * 64] * 2, errors={1: "damaged"})
    assert [f["raised"][0] for f in found] == ["AgreementError", "PlanError"]


@pytest.mark.ranks
def test_ranks_that_all_refuse_keep_their_own_errors(ext: RankPool) -> None:
    errors = {0: "first", 1: "second", 2: "third"}
    found = ext.run(CASE, 3, digests=[""] * 3, errors=errors)
    assert [f["raised"] for f in found] == [("PlanError", errors[r]) for r in range(3)]
    assert all(f["own"] for f in found)


@pytest.mark.ranks
def test_ranks_stop_together_where_one_has_an_error(ext: RankPool) -> None:
    case = "tests.support.agree_cases:stop_together"
    found = ext.run(case, 2, errors={})
    assert [(f["raised"], f["calls"]) for f in found] == [(None, ONE)] * 2
    expected = "stopped because 1 of 2 ranks refused:\n  rank 1: PlanError: damaged"
    for planning, what in (((), "reading X"), ((0,), "planning")):
        found = ext.run(case, 2, errors={1: "damaged"}, planning=planning)
        assert found[0]["raised"] == ("AgreementError", f"{what}: {expected}")
        assert found[1]["raised"] == ("PlanError", "damaged")
        assert found[1]["own"] is True
        assert [f["calls"] for f in found] == [TWO] * 2


@pytest.mark.ranks
def test_several_refusals_are_all_in_the_message(ext: RankPool) -> None:
    found = ext.run(CASE, 3, digests=[A, "", ""], errors={1: "first", 2: "second"})
    assert found[0]["raised"] == (
        "AgreementError",
        "resume of X: stopped because 2 of 3 ranks refused:\n"
        "  rank 1: PlanError: first\n"
        "  rank 2: PlanError: second",
    )


@pytest.mark.ranks
def test_totals_are_summed_in_one_collective_of_eight_bytes_a_number(ext: RankPool) -> None:
    found = ext.run("tests.support.agree_cases:total", 3)
    assert [f["values"] for f in found] == [[6, 30, -3, 3 * 2**40]] * 3
    assert [f["calls"] for f in found] == [[("all_reduce", 32)]] * 3


@pytest.mark.parametrize(
    ("accelerator", "backends", "expected"),
    [
        ("cuda", "cpu:gloo,cuda:gloo", "cpu"),
        ("cuda", "cpu:gloo", "cpu"),
        ("cuda", "cpu:fake,cuda:fake,hpu:fake,xpu:fake", "cpu"),
        ("cuda", "cuda:nccl", "cuda:3"),
        ("cuda", "cpu:gloo,cuda:nccl", "cuda:3"),
        ("npu", "npu:hccl", "npu:3"),
        # What torch takes where no backend is named.
        ("xpu", "cpu:gloo,cuda:nccl,xpu:xccl", "xpu:3"),
        (None, "cpu:gloo,cuda:nccl,xpu:xccl", "cpu"),
    ],
)
def test_the_device_of_a_collective_is_that_of_the_groups_backend(
    accelerator: str | None, backends: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(
        is_available=lambda: accelerator is not None,
        current_accelerator=lambda: accelerator and SimpleNamespace(type=accelerator),
    )
    module = SimpleNamespace(current_device=lambda: 3)
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    monkeypatch.setattr(torch, "accelerator", found)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    # torch names a device of another vendor once its package is imported.
    monkeypatch.setattr(torch, "device", lambda *parts: ":".join(map(str, parts)))
    assert device() == expected


@pytest.mark.ranks
def test_float64_is_summed_where_the_backend_may_not_reduce_it(ext: RankPool) -> None:
    values = [[1e300, 0.1, 3.0], [2.0**53, 0.2, -3.0], [1.0, 0.3, 0.5]]
    found = ext.run("tests.support.agree_cases:sum_without_float64", 3, values=values)
    # Rank by rank: Python's sum would carry what is rounded away.
    expected = [functools.reduce(operator.add, column) for column in zip(*values, strict=True)]
    assert found == [(expected, ["all_gather_object"])] * 3
