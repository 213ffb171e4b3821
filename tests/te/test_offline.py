"""The offline commands on checkpoints that stock has written with Transformer Engine's classes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.cli import main
from tests.conftest import FIRST
from tests.support import inspected
from tests.support.cells import chosen
from tests.support.harness import Layout
from tests.support.pool import RankPool
from tests.te.test_cells import FORMATS, PRECISIONS, Written

pytestmark = pytest.mark.ranks

CELLS = [(precision, form) for precision in PRECISIONS for form in FORMATS]
RAN: list[tuple[str, str]] = []
TO = ["--to", "fully_reshardable"]


@pytest.fixture(scope="module")
def written(stock: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(stock, tmp_path_factory.mktemp("written"))


def printed(capsys: pytest.CaptureFixture[str], *command: str) -> tuple[int, dict[str, Any]]:
    status = main([*command, "--json"])
    told = capsys.readouterr()
    return status, json.loads(told.out) if told.out else {"error": told.err}


@pytest.mark.parametrize(("precision", "form"), CELLS)
def test_what_is_said_of_a_checkpoint_is_true(
    precision: str, form: str, written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, saved = written(Layout(precision=precision, format=form), 2)
    count = sum(tensors["param"].size for tensors in saved["state"].values())
    by_parameter = form == "fully_reshardable"
    remainders = precision == "remainders"
    status, document = printed(capsys, "verify", directory)
    masters = document["master_weights"]
    assert (document["damages"], document["values"]) == ([], [])
    assert masters["remainders"] == (count if remainders and by_parameter else 0)
    assert masters["elements"] == (count if by_parameter and not remainders else 0)
    # Its arguments, which the harness does not save, would tell the flag.
    assert status == (1 if precision == "fp16 masters" and by_parameter else 0)
    wrong = sum(d["elements"] for d in masters["differences"])
    assert wrong == masters["rounded_twice"] < 0.05 * count
    notes = " ".join(document["notes"])
    assert ("does not store them by parameter" in notes) == (not by_parameter)
    assert ("remainders" in notes) == (remainders and form == "dp_reshardable")
    if form != "torch":
        assert_statistics(directory, saved, masters, by_parameter, capsys)
    RAN.append((precision, form))


def assert_statistics(
    directory: str,
    saved: dict[str, Any],
    masters: dict[str, Any],
    by_parameter: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What inspect says of the moments is what the optimizer had, whose dtype has a scale."""
    _, document = printed(capsys, "inspect", directory, "--moments")
    assert document["master_weights"] == masters
    moments = inspected.stacked(saved["state"])
    found = {(s["state"], s["name"]): s for s in document["statistics"]}
    for state in ("exp_avg", "exp_avg_sq"):
        norms = [s["norm"] for (one, _), s in found.items() if one == state]
        wanted = [float(np.linalg.norm(v)) for (one, _), v in moments.items() if one == state]
        assert len(norms) == (len(wanted) if by_parameter else 1)
        np.testing.assert_allclose(math.hypot(*norms), math.hypot(*wanted), rtol=1e-6)
    assert not any(s["nonfinite"] for s in found.values())


def test_every_cell_ran(request: pytest.FixtureRequest) -> None:
    assert len(CELLS) == 21
    assert len(RAN) == len(set(RAN)) == chosen(request, test_what_is_said_of_a_checkpoint_is_true)


#: Precision and format -> what a conversion says; nothing for a copy that has every element.
CONVERSIONS = {
    ("bf16", "dp_reshardable"): "",
    ("fp16", "dp_reshardable"): "",
    ("fp8 and fp16", "dp_reshardable"): "",
    ("fp16 masters", "dp_reshardable"): "if the run had --main-params-dtype fp16",
    ("remainders", "dp_reshardable"): "found int16 numbers: they are remainders",
    ("fp16 masters", "fully_reshardable"): "There is nothing to convert: load it as it is",
    ("remainders", "fully_reshardable"): "which tell whether the state was stored shifted",
    ("remainders", "torch"): "found the format torch. There is nothing to convert",
}


@pytest.mark.parametrize(("cell", "said"), CONVERSIONS.items(), ids=map(str, CONVERSIONS))
def test_a_conversion_has_every_element_or_says_why_not(
    cell: tuple[str, str],
    said: str,
    written: Written,
    stock: RankPool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    precision, form = cell
    directory, saved = written(Layout(precision=precision, format=form), 2)
    target = tmp_path / "new"
    status, document = printed(capsys, "convert", directory, str(target), *TO)
    assert status == (2 if said else 0)
    assert said in document.get("error", "")
    if said:
        assert not target.exists()
        return
    (state,) = stock.run(
        "tests.support.policies_stock:state",
        1,
        layout=Layout(format="fully_reshardable"),
        hyper=FIRST,
        directory=str(target),
    )
    for name, tensors in saved["state"].items():
        for key, value in tensors.items():
            np.testing.assert_array_equal(state[name][key], value, err_msg=name)
