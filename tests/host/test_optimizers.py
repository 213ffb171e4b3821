"""The table of optimizers against the classes themselves, and nothing of Megatron's is missing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.errors import HostError
from megatron_ext.host.optimizers import ADAM, SECOND, STORED, TABLE, state_of, state_of_group
from tests.support.optimizer_cases import BROKEN
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

#: What Megatron 0.19.2 builds with emerging-optimizers 0.3.0 -> the row. A new name fails the test.
ROWS = {
    **{"adam": "Adam", "adamw of torch": "Adam of torch", "adam of torch": "Adam of torch"},
    **{"sgd": "SGD", "sgd of torch": "SGD", "lion": "Lion", "laprop": "LaProp"},
    **dict.fromkeys(("muon", "mop", "polargrad", "scion"), "Muon"),
    **{"sinkhorn_muon": "Muon", "spel": "Muon", "muon_hyperball": "Muon Hyperball"},
    **{"adaptive_muon": "Adaptive Muon", "soap": "SOAP", "rekls": "SOAP"},
}


@pytest.fixture(scope="module")
def tried(ext: RankPool) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = ext.run("tests.support.optimizer_cases:described", 1)[0]
    return found


def test_every_optimizer_that_megatron_builds_has_its_row(tried: dict[str, dict[str, Any]]) -> None:
    assert {name: one["row"].name for name, one in tried.items()} == ROWS
    assert {one["row"].name for one in tried.values()} == {row.name for row in TABLE}


def test_the_state_and_the_group_are_those_of_the_class(tried: dict[str, dict[str, Any]]) -> None:
    for name, one in tried.items():
        row, state = one["row"], dict(one["state"])
        assert one["error"] == "" or BROKEN[one["class"]] in one["error"], name
        in_state = state.pop("step", None) is not None or "step" in one["state"]
        assert in_state == (row.step == "state"), name
        assert ("step" in one["group"]) == (row.step == "group"), name
        assert set(state) == {*row.tensors, *row.others}, name
        assert all(tuple(state[tensor]) == (6, 4) for tensor in row.tensors), name
        assert set(row.hyperparameters) <= set(one["group"]), name
        by_group = state_of_group(one["group"])
        assert by_group is not None, name
        same = {"Adam of torch": "Adam", "Muon Hyperball": "Muon"}
        assert by_group.name == same.get(row.name, row.name)
        assert by_group.moments == row.moments, name


def test_the_moments_follow_the_gradient_as_the_row_says(tried: dict[str, dict[str, Any]]) -> None:
    """Two steps in float64: x = b x + (1 - b) g^n, or b x + g."""
    checked = []
    for name, one in tried.items():
        for moment in one["row"].moments:
            if not moment.of_gradient or one["row"].rotated or one["error"]:
                continue
            x, b = np.zeros((6, 4)), moment.decay_in(one["group"])
            assert 0.0 < b < 1.0
            for gradient, state in zip(one["gradients"], one["steps"], strict=True):
                added = gradient**moment.order
                x = b * x + (added * (1 - b) if moment.average else added)
                np.testing.assert_allclose(state[moment.tensor], x, rtol=2e-6, atol=1e-9)
            checked.append((name, moment.tensor))
    # Two of each Adam, one of Lion, of each SGD and of each kin of Muon, and LaProp's second.
    assert len(checked) == 3 * 2 + 1 + 2 + 7 + 1


def test_a_rotation_keeps_the_norm_of_the_moments(tried: dict[str, dict[str, Any]]) -> None:
    """What the guard leans on: in an orthogonal basis the average has the same norm."""
    found = [one for one in tried.values() if one["row"].rotated]
    assert len(found) == 2
    for one in found:
        first, _ = one["row"].moments
        b, (g, h) = first.decay_in(one["group"]), one["gradients"]
        expected = np.linalg.norm(b * (1 - b) * g + (1 - b) * h)
        assert np.linalg.norm(one["steps"][1][first.tensor]) == pytest.approx(expected, rel=1e-4)


def test_an_unknown_optimizer_is_refused_with_what_is_known() -> None:
    with pytest.raises(HostError, match="the state of Adagrad is not known") as error:
        state_of(torch.optim.Adagrad([torch.zeros(1)]))
    for row in TABLE:
        assert str(row) in str(error.value)


def test_sgd_without_momentum_has_no_moments() -> None:
    plain = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    assert state_of(plain).tensors == ()
    with_momentum = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9)
    assert state_of(with_momentum).tensors == ("momentum_buffer",)


def test_a_subclass_has_the_row_of_its_base_and_no_optimizer_counts_as_adam() -> None:
    class Mine(torch.optim.SGD):
        pass

    assert state_of(Mine([torch.zeros(1)], lr=0.1, momentum=0.9)).name == "SGD"
    assert state_of(None) is ADAM
    assert state_of_group({"lr": 0.1}) is None


def test_the_tensors_of_all_rows() -> None:
    assert STORED == ("exp_avg", "exp_avg_sq", "momentum_buffer", "moment2_buffer")
    assert sorted(SECOND) == ["exp_avg_sq", "moment2_buffer"]
