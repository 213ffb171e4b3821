"""Master weights that a run stores in another way than the checkpoint's, and remainders."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.conftest import FIRST, STEPS
from tests.resume.test_policies import SECOND
from tests.support.harness import Layout
from tests.support.pool import Failure, RankPool
from tests.te.test_cells import Written

pytestmark = pytest.mark.ranks

MORE = 3
FORMATS = ("dp_reshardable", "fully_reshardable", "torch")
RESUMED = "tests.support.te_runs:resumed"


@pytest.fixture(scope="module")
def written(stock: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(stock, tmp_path_factory.mktemp("written"))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("before", "after"),
    [("remainders", ""), ("", "remainders"), ("remainders", "fp32"), ("fp32", "remainders")],
    ids=["dropped", "added", "to masters", "to remainders"],
)
def test_remainders_and_master_weights_become_each_other(
    before: str, after: str, form: str, stock: RankPool, ext: RankPool, written: Written
) -> None:
    layout = Layout(precision=before, format=form)
    directory, saved = written(layout, 2)
    layout = replace(layout, precision=after)
    (found, *_) = ext.run(RESUMED, 2, layout=layout, hyper=SECOND, directory=directory, more=MORE)
    for name, tensors in saved["state"].items():
        for key, value in tensors.items():
            # Of a tie that torch has rounded down a remainder has not the last bit.
            np.testing.assert_allclose(found["state"][name][key], value, rtol=2e-7, err_msg=name)
    assert found["checked"]
    (expected, *_) = stock.run(
        "tests.support.oracle:uninterrupted",
        2,
        layout=layout,
        first=FIRST,
        second=SECOND,
        steps=STEPS,
        more=MORE,
    )
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-6)


@pytest.mark.parametrize("form", ["fully_reshardable", "torch"])
def test_remainders_that_are_saved_whole_are_master_weights(
    form: str, stock: RankPool, ext: RankPool, written: Written, tmp_path: Any
) -> None:
    layout = Layout(precision="remainders", format=form)
    directory, saved = written(layout, 2)
    target = str(tmp_path / "iter_0000004")
    run: dict[str, Any] = dict(layout=layout, hyper=FIRST, directory=directory)
    ext.run("tests.support.te_runs:saved_again", 2, target=target, **run)
    plain = replace(layout, precision="")
    (stored, *_) = stock.run(
        "tests.support.policies_stock:state", 2, layout=plain, hyper=FIRST, directory=target
    )
    (again, *_) = ext.run(RESUMED, 2, **{**run, "directory": target})
    for name, tensors in saved["state"].items():
        np.testing.assert_array_equal(stored[name]["param"], tensors["param"], err_msg=name)
        np.testing.assert_array_equal(again["state"][name]["param"], tensors["param"])
    assert again["proven"] > 0


def test_master_weights_of_other_weights_do_not_become_remainders(
    stock: RankPool, ext: RankPool, tmp_path: Any
) -> None:
    layout = Layout(format="dp_reshardable")
    directory = str(tmp_path / "iter_0000004")
    stock.run(
        "tests.support.te_stock:with_other_weights",
        2,
        layout=layout,
        hyper=FIRST,
        steps=STEPS,
        directory=directory,
    )
    layout = replace(layout, precision="remainders")
    run: dict[str, Any] = dict(layout=layout, hyper=SECOND, directory=directory, more=1)
    refused = ext.run(RESUMED, 2, allow_failure=True, **run)
    assert all(isinstance(one, Failure) for one in refused)
    assert {one.type for one in refused} <= {"CheckpointError", "AgreementError"}
    message = next(one.message for one in refused if one.type == "CheckpointError")
    assert "master weights are not the weights that the model has loaded" in message
    assert "output_layer.weight" in message
    (found, *_) = ext.run(RESUMED, 2, policy="{master_weights: model}", **run)
    assert found["proven"] == 0
    for tensors in found["state"].values():
        whole = tensors["param"].view(np.uint32)
        assert not (whole & 0xFFFF).any()


@pytest.mark.parametrize("after", ["", "remainders"])
def test_fp16_master_weights_are_refused_elsewhere_and_the_way_out_works(
    after: str, ext: RankPool, written: Written
) -> None:
    layout = Layout(precision="fp16 masters", format="fully_reshardable")
    directory, saved = written(layout, 1)
    run: dict[str, Any] = dict(layout=replace(layout, precision=after), hyper=SECOND)
    run |= {"directory": directory, "more": 1}
    (refused,) = ext.run(RESUMED, 1, allow_failure=True, **run)
    assert refused.type == "CheckpointError"
    assert "had --main-params-dtype fp16 and rounded its weights twice" in refused.message
    assert "--selective-master-weights model" in refused.message
    (found,) = ext.run(RESUMED, 1, policy="{master_weights: model}", **run)
    for name, tensors in saved["state"].items():
        np.testing.assert_allclose(found["state"][name]["param"], tensors["param"], rtol=2.0**-7)
