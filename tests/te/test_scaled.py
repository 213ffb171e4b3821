"""Moments with a scale that are zero, not finite, or too small for the scale."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.conftest import FIRST, STEPS
from tests.resume.test_policies import SECOND
from tests.support.harness import Layout
from tests.support.pool import Failure, RankPool

pytestmark = pytest.mark.ranks

RESUMED = "tests.support.te_runs:resumed"
RESET = "moments: [{match: '*', exp_avg: reset, exp_avg_sq: reset}]"
NAMES = "output_layer.weight", "embedding.word_embeddings.weight"
#: NaN in one moment of one parameter, an infinite element of another.
DAMAGES = {NAMES[0]: {"exp_avg": float("nan")}, NAMES[1]: {"exp_avg_sq": float("inf")}}


@pytest.mark.parametrize("precision", ["fp16", "fp8 and fp16", "bf16"])
def test_a_live_optimizer_whose_moments_are_reset_trains_on(precision: str, ext: RankPool) -> None:
    (found, *_) = ext.run(
        "tests.support.te_runs:transformed",
        1,
        layout=Layout(precision=precision),
        hyper=FIRST,
        directory=None,
        live=[RESET, "moments: [{match: '*', exp_avg: scale 0.5}]"],
        steps=2,
        more=2,
    )
    assert found["finite"]
    assert np.isfinite(found["losses"]).all()
    assert found["losses"][-1] < found["losses"][0] + 0.5
    for tensors in found["state"].values():
        assert all(np.isfinite(value).all() for value in tensors.values())


@pytest.mark.parametrize("precision", ["fp16", "fp8 and fp16"])
@pytest.mark.parametrize("rule", ["fill 0.25", "fill 0.0", "fill 1e-40"])
def test_a_whole_moment_is_filled(
    precision: str, rule: str, ext: RankPool, stock: RankPool, tmp_path: Any
) -> None:
    layout = Layout(precision=precision)
    directory = str(tmp_path / "iter_0000004")
    run: dict[str, Any] = dict(layout=layout, directory=directory)
    stock.run("tests.support.old:written", 1, hyper=FIRST, steps=STEPS, **run)
    policy = f"moments: [{{match: '*', exp_avg: {rule}, exp_avg_sq: {rule}}}]"
    (found,) = ext.run(RESUMED, 1, hyper=SECOND, policy=policy, more=1, **run)
    number = float(rule.split()[1])
    for tensors in found["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            np.testing.assert_allclose(tensors[key], number, rtol=1e-3, atol=1e-30)
    assert found["finite"]
    assert found["checked"]


@pytest.mark.parametrize("form", ["dp_reshardable", "fully_reshardable"])
@pytest.mark.parametrize("precision", ["fp16", "fp8 and fp16", "bf16"])
def test_elements_that_are_not_finite_are_counted_and_reset_alone(
    precision: str, form: str, stock: RankPool, ext: RankPool, tmp_path: Any
) -> None:
    layout = Layout(precision=precision, format=form)
    directory = str(tmp_path / "iter_0000004")
    run: dict[str, Any] = dict(layout=layout, directory=directory)
    (saved,) = stock.run(
        "tests.support.te_stock:damaged", 1, hyper=FIRST, steps=STEPS, changes=DAMAGES, **run
    )
    assert saved["changed"] == len(DAMAGES)
    run |= {"hyper": SECOND}
    (refused,) = ext.run(RESUMED, 1, allow_failure=True, **run)
    assert isinstance(refused, Failure)
    assert refused.type == "CheckpointError"
    assert f"{NAMES[0]}: 1 of exp_avg not finite" in refused.message
    assert f"{NAMES[1]}: 1 of exp_avg_sq not finite" in refused.message
    (found,) = ext.run(RESUMED, 1, policy="{nonfinite: reset}", more=1, **run)
    assert found["nonfinite"] == 2
    assert "2 elements of the moments" in "\n".join(found["lines"])
    assert found["finite"]
    for name, tensors in saved["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            wanted = tensors[key].copy()
            if name in NAMES:
                wanted.reshape(-1)[0] = 0.0
            ours = found["state"][name][key]
            atol = 2.0**-9 * np.abs(wanted).max()
            np.testing.assert_allclose(ours, wanted, 2.0**-3, atol, err_msg=name)
            assert (ours == wanted).mean() > 0.9
    (kept,) = ext.run(RESUMED, 1, policy="{nonfinite: keep}", **run)
    wrong = [
        int((~np.isfinite(kept["state"][name][key])).sum())
        for name, key in ((NAMES[0], "exp_avg"), (NAMES[1], "exp_avg_sq"))
    ]
    assert wrong == [1, 1]


#: Steps before the save; without one all moments are zero, and their scale is 1.
ZEROS = [
    (precision, form, steps)
    for precision, some in {"fp16": (0, STEPS), "fp8 and fp16": (0,), "remainders": (0,)}.items()
    for form in ("dp_reshardable", "fully_reshardable", "torch")
    for steps in some
]


@pytest.mark.parametrize(("precision", "form", "steps"), ZEROS)
def test_moments_that_stock_has_saved_as_zeros_are_zeros(
    precision: str, form: str, steps: int, stock: RankPool, ext: RankPool, tmp_path: Any
) -> None:
    layout = Layout(precision=precision, format=form)
    directory = str(tmp_path / "iter_0000004")
    run: dict[str, Any] = dict(layout=layout, hyper=FIRST, directory=directory)
    unused = "embedding.position_embeddings.weight"
    (saved, *_) = stock.run("tests.support.te_stock:of_zeros", 2, steps=steps, unused=unused, **run)
    zeros = [unused] if steps else list(saved)
    for name in zeros:
        assert not saved[name]["exp_avg"].any()
        assert not saved[name]["exp_avg_sq"].any()
    (found, *_) = ext.run(RESUMED, 2, more=2, **run)
    assert found["nonfinite"] == 0
    assert found["steps"] == [steps]
    for name, tensors in saved.items():
        np.testing.assert_array_equal(found["state"][name]["param"], tensors["param"])
        for key in ("exp_avg", "exp_avg_sq"):
            np.testing.assert_allclose(found["state"][name][key], tensors[key], 2.0**-10, 1e-9)
            assert found["state"][name][key].any() == tensors[key].any()
    assert found["finite"]
    assert found["checked"]
    if steps:
        return
    (expected, *_) = stock.run(
        "tests.support.oracle:uninterrupted",
        2,
        layout=layout,
        first=FIRST,
        second=FIRST,
        steps=0,
        more=2,
    )
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-6)


def test_every_form_of_zeros_is_a_case() -> None:
    assert len(ZEROS) == len(set(ZEROS)) == 12


#: How often a load of any number of parameters waits for the device.
WAITS = {"bf16": 1, "fp16": 1, "fp8 and fp16": 1, "fp16 masters": 1, "remainders": 0}


@pytest.mark.parametrize("precision", WAITS)
def test_a_load_waits_for_the_device_once(
    precision: str, stock: RankPool, ext: RankPool, tmp_path: Any
) -> None:
    layout = Layout(precision=precision)
    directory = str(tmp_path / "iter_0000004")
    run: dict[str, Any] = dict(layout=layout, directory=directory)
    stock.run("tests.support.te_stock:saved", 1, hyper=FIRST, steps=STEPS, **run)
    ((written, waits),) = ext.run("tests.support.proof_cases:waits", 1, hyper=SECOND, **run)
    assert written > 20
    assert waits == WAITS[precision]


BATCHED = "tests.support.te_runs:in_batches"


@pytest.mark.parametrize("precision", ["fp16", "fp8 and fp16"])
def test_the_copies_of_a_change_are_bounded(precision: str, ext: RankPool) -> None:
    """Without a bound they would need more than small moments save."""
    policy = "moments: [{match: '*', exp_avg: fill 0.25, exp_avg_sq: fill 0.5}]"
    run: dict[str, Any] = dict(layout=Layout(precision=precision), hyper=FIRST, policy=policy)
    (whole,) = ext.run(BATCHED, 1, steps=2, copies=None, **run)
    (batched,) = ext.run(BATCHED, 1, steps=2, copies=1, **run)
    # A network so small is one batch; each parameter is one with a bound of a byte.
    assert whole["most"] == whole["all"]
    assert whole["most"] > 2 * whole["largest"]
    assert batched["most"] <= batched["largest"]
    assert batched["all"] == whole["all"]
    _require_equal(batched["state"], whole["state"])


@pytest.mark.parametrize("precision", ["fp16", "fp8 and fp16"])
def test_the_copies_for_a_quantile_are_bounded(precision: str, ext: RankPool) -> None:
    policy = "{preset: relora 0.5}"
    run: dict[str, Any] = dict(layout=Layout(precision=precision), hyper=FIRST, policy=policy)
    (whole,) = ext.run(BATCHED, 1, steps=2, copies=None, **run)
    (batched,) = ext.run(BATCHED, 1, steps=2, copies=1, **run)
    assert whole["most"] > 2 * whole["largest"]
    assert batched["most"] <= batched["largest"]
    # Three times for the quantiles, once for the change.
    assert batched["all"] == whole["all"] == 4 * whole["most"]
    _require_equal(batched["state"], whole["state"])


def _require_equal(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name, tensors in other.items():
        for key, value in tensors.items():
            np.testing.assert_array_equal(one[name][key], value)


def test_a_bad_range_in_the_last_batch_is_refused_before_the_first_is_written(
    ext: RankPool,
) -> None:
    (found,) = ext.run(
        "tests.support.te_runs:bad_range", 1, layout=Layout(precision="fp16"), hyper=FIRST
    )
    assert "elements 3 to 9 have two rules or are not within the shard's" in found["error"]
    assert found["unchanged"]
