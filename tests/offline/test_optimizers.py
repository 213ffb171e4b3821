"""The offline commands name the state of every optimizer by its tensors."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.cli import main
from tests.conftest import FIRST
from tests.support.harness import Layout
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

PLAIN = Layout(distributed=False)
#: Case -> layout, and the tensors of each part of its chain.
CASES: dict[str, tuple[Layout, list[set[str]]]] = {
    "sgd": (replace(PLAIN, optimizer="sgd"), [{"momentum_buffer"}]),
    "lion": (replace(PLAIN, optimizer="lion"), [{"exp_avg"}, {"exp_avg", "exp_avg_sq"}]),
    "muon": (replace(PLAIN, optimizer="muon"), [{"momentum_buffer"}, {"exp_avg", "exp_avg_sq"}]),
    "muon and lion": (
        replace(PLAIN, optimizer="muon", scalar="lion"),
        [{"momentum_buffer"}, {"exp_avg"}],
    ),
    "lion, by bucket": (Layout(optimizer="lion"), [{"exp_avg"}]),
    "lion, fully_reshardable": (
        Layout(optimizer="lion", format="fully_reshardable"),
        [{"exp_avg"}],
    ),
}


def command(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, Any]:
    status = main([*map(str, words), "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("case", CASES)
def test_the_commands_read_what_the_optimizer_stores(
    case: str, stock: RankPool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout, tensors = CASES[case]
    directory = tmp_path / "a"
    (saved,) = stock.run(
        "tests.support.optimizer_stock:expected",
        1,
        layout=layout,
        first=FIRST,
        second=FIRST,
        directory=str(directory),
        changes=[],
    )
    everything = set().union(*tensors)
    status, found = command(capsys, "inspect", directory, "--moments")
    assert status == 0
    master = "param" if layout.distributed else "fp32_param"
    assert {m["state"] for m in found["moments"]} == {*everything, master}
    for tensor in everything:
        squares = [
            float(np.sum(np.square(one[tensor], dtype=np.float64)))
            for one in saved["saved"]
            if tensor in one
        ]
        norms = [s["norm"] for s in found["statistics"] if s["state"] == tensor]
        assert math.hypot(*norms) == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)
        assert sum(squares) > 0.0
    status, found = command(capsys, "verify", directory)
    assert (status, found.get("damaged", [])) == (0, [])
    status, found = command(capsys, "diff", directory, directory, "--moments")
    assert status == 0
    assert {d["state"] for d in found["distances"]} == {*everything, master}
    status, found = command(
        capsys, "edit", directory, "--out", tmp_path / "b", "--set", "max_lr=1e-3"
    )
    assert status == 0
    status, found = command(
        capsys,
        *("plan", directory, "--optimizer", layout.optimizer, "--lr", "1e-3", "--min-lr", "1e-4"),
        *("--selective-rule", "*", "scale 0.5", "keep", "--bf16"),
        *(["--use-distributed-optimizer"] if layout.distributed else []),
    )
    classes = list(dict.fromkeys(one["class"] for one in saved["saved"]))
    held = [
        sum(one["param"].size for one in saved["saved"] if one["class"] == name) for name in classes
    ]
    rules = [{r["rule"]: r["elements"] for r in o["rules"]} for o in found["optimizers"]]
    assert [r["*"] for r in rules] == held
