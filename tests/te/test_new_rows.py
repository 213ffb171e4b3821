"""A grown vocabulary, whose new rows have master weights in TransformerEngine's FusedAdam."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.conftest import FIRST, STEPS
from tests.support.harness import Layout
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

#: Precision -> error of master weights, relative to the largest: fp16 has another scale.
PRECISIONS = {"fp32": 0.0, "bf16 exp_avg": 0.0, "fp16 masters": 2.0**-11, "remainders": 0.0}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("world", [1, 2])
def test_new_rows_stay_as_initialised(
    precision: str, world: int, stock: RankPool, ext: RankPool, tmp_path: Any
) -> None:
    small = Layout(precision=precision, format="fully_reshardable", vocab=40, hidden=20)
    large = replace(small, vocab=50)
    directory = str(tmp_path / "iter_0000004")
    run: dict[str, Any] = dict(hyper=FIRST, directory=directory)
    (before, *_) = stock.run(
        "tests.support.vocabulary_stock:phase_1", 1, layout=small, steps=STEPS, **run
    )
    (fresh, *_) = stock.run(
        "tests.support.vocabulary_stock:fresh", world, layout=large, hyper=FIRST
    )
    (found, *_) = ext.run(
        "tests.support.vocabulary:resumed",
        world,
        layout=large,
        policies={"keep": "{}"},
        steps=2,
        **run,
    )
    ours = found["keep"]
    for name, tensors in before["state"].items():
        old, new = tensors["param"], fresh["state"][name]["param"]
        wanted = np.concatenate([old, new[len(old) :]])
        atol = PRECISIONS[precision] * np.abs(wanted).max()
        masters = ours["state"][name]["param"]
        np.testing.assert_allclose(masters, wanted, rtol=0, atol=atol, err_msg=name)
        assert not ours["state"][name]["exp_avg"][len(old) :].any()
    if precision == "remainders":
        return  # stock cannot load them
    # Stock without the flag has the initial values in the new rows.
    (expected, *_) = stock.run(
        "tests.support.vocabulary_stock:corrected",
        world,
        layout=replace(large, precision=""),
        saved_rows=len(before["state"]["output_layer.weight"]["param"]),
        steps=2,
        **run,
    )
    np.testing.assert_allclose(ours["trained"]["losses"], expected["losses"], rtol=1e-3)
