"""The rows of Transformer Engine's optimizer classes in the table of optimizers."""

from __future__ import annotations

import pytest

from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks


def test_the_state_and_the_group_of_fused_sgd_are_those_of_its_row(ext: RankPool) -> None:
    """Its state is allocated before its kernel, which is compiled and is not run here."""
    found = ext.run("tests.support.te_cases:fused_sgd", 1)[0]
    row = found["row"]
    assert (found["class"], row.name) == ("FusedSGD", "SGD")
    assert found["state"] == {"momentum_buffer": (6, 4)}
    assert set(row.tensors) == set(found["state"])
    assert set(row.hyperparameters) <= found["group"]
    assert "step" not in found["group"]
    assert found["module"].startswith("transformer_engine.")
