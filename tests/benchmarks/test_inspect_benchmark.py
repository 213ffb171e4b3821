"""What the benchmark of inspect makes of its runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.inspect import report
from benchmarks.inspect.__main__ import COMMANDS
from benchmarks.inspect.measure import Case, Result, measure
from benchmarks.inspect.synthetic import Moe, counts, planned

SMALL = Moe(layers=4, experts=4, hidden=64, expert_ffn=32, pipeline=2, expert=2, ranks=16)


def result(elements: int, seconds: float = 5.0, **changes: Any) -> Result:
    fields = {"all_seconds": seconds + 3, "peak": 10**9, "index": 10**8, "runs": (seconds,)}
    case = Case("inspect", "dp_reshardable", True, elements)
    return Result(case, seconds, **{**fields, "document": {}, **changes})


@pytest.mark.parametrize(
    ("once", "twice", "met"),
    [
        (result(1), result(2, 10.0), [True, True, True]),
        (result(1, 7.1), result(2, 10.0), [False, True, True]),
        (result(1, peak=2 * 10**9 + 1), result(2), [True, False, True]),
        (result(1), result(2, 11.1), [True, True, False]),
    ],
)
def test_figures_are_held_against_the_targets(once: Result, twice: Result, met: list[bool]) -> None:
    found = list(report.targets([once, twice]))
    assert [t["met"] for t in found] == met
    assert report.markdown({}, [once, twice]).count("**missed**") == met.count(False)


def test_a_wrong_answer_is_no_measurement(tmp_path: Path) -> None:
    planned(SMALL, "dp_reshardable").write(tmp_path / "a", with_plans=True)
    words = ["inspect", str(tmp_path / "a"), "--json"]
    found = measure(Case("inspect", "dp_reshardable", True, SMALL.elements), words, 1, 5)
    assert found.seconds > 0
    assert found.all_seconds > found.seconds
    assert found.peak > 10**8
    found.require(counts(SMALL, "dp_reshardable"))
    with pytest.raises(RuntimeError, match="expected"):
        found.require(counts(SMALL.twice(), "dp_reshardable"))
    (files, _) = report.write(tmp_path, "x", {"CPU": "any"}, [found, found])
    content = json.loads(files.read_text())
    assert len(content["targets"]) == 3
    assert "document" not in content["results"][0]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_benchmark_runs_is_right(command: str, tmp_path: Path) -> None:
    moe = Moe(layers=8, experts=4, hidden=64, expert_ffn=32, pipeline=2, expert=2, ranks=16)
    directory = tmp_path / "checkpoint"
    planned(moe, "fully_reshardable").write(directory, with_plans=True)
    case = Case(command, "fully_reshardable", with_plans=True, elements=moe.elements)
    found = measure(case, COMMANDS[command](directory), repeats=1, index=0)

    def require(model: Moe) -> None:
        if command == "inspect":
            found.require(counts(model, "fully_reshardable"))
        else:
            found.require_rules(model)

    require(moe)
    for wrong in (moe.twice(), replace(moe, experts=3)):
        with pytest.raises(RuntimeError, match="expected"):
            require(wrong)
