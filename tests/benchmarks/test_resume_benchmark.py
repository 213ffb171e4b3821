"""What the benchmark of a resume computes from its samples."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import markers
from benchmarks.kernel import page as kernel_page
from benchmarks.markers import PAGE
from benchmarks.resume import cases, model, page, report, summary
from benchmarks.resume.cases import KEEP, RESET, RESET_V, STOCK, VARIANTS, Case
from benchmarks.resume.scale import Moe, simulate

CASE = Case("dp_reshardable", 10, 1, 20)
PARAMETERS = 10_000


def sample(variant: str, repeat: int, slower: float = 1.0, left: int = 14) -> dict[str, Any]:
    at = 1.0 + 0.01 * repeat
    return {
        "variant": variant,
        "repeat": repeat,
        "seconds": {
            "build": 9.0,
            "sharded_state_dict": 0.1 * at * slower,
            "read": 0.5 * at * slower,
            "load_state_dict": 0.4 * at * slower,
            "first step": 0.2,
        },
        "peak": {"build": 10**9, "read": 1000, "load_state_dict": 2000},
        "device_peak": {},
        "payload": left * PARAMETERS,
        "stored": left * PARAMETERS + 100,
    }


def result(**slower: float) -> dict[str, Any]:
    left = {RESET: 6, RESET_V: 10, "reset, cold": 6}
    samples = [
        sample(v.name, r, slower.get(v.name, 1.0), left.get(v.name, 14))
        for r in range(1, 21)
        for v in VARIANTS
    ]
    return {
        "parameters": PARAMETERS,
        "samples": samples,
        "memory": copy.deepcopy(samples),
        "collectives": {v.name: {"read": {"all_gather_object": [1, 50]}} for v in VARIANTS},
        "step": {v.name: {"function": "step", "collectives": {}} for v in VARIANTS},
    }


def found(series: dict[str, Any], what: str, case: Case = CASE) -> summary.Verdict:
    (one,) = [v for v in summary.verdicts(case, series, "cpu") if v.figure.endswith(f": {what}")]
    return one


def test_a_ratio_is_that_of_pairs_in_one_repeat() -> None:
    """Each repeat is slower than the one before: only pairs show the same factor."""
    ratio = summary.ratio(result(keep=1.5)["samples"], KEEP, STOCK, summary.load_seconds)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert ratio.pairs == 20


def test_an_interval_holds_the_median_and_grows_with_the_spread() -> None:
    series = result()
    for s in series["samples"]:
        if s["variant"] == KEEP:
            s["seconds"]["read"] *= 1.0 + 0.5 * math.sin(s["repeat"])
    ratio = summary.ratio(series["samples"], KEEP, STOCK, summary.load_seconds)
    assert ratio.low < ratio.median < ratio.high
    assert 0.05 < ratio.high - ratio.low < 0.6


@pytest.mark.parametrize(
    ("slower", "verdict"), [(1.0, "met"), (1.01, "met"), (1.02, "missed"), (0.9, "met")]
)
def test_the_load_has_to_be_as_fast_as_stocks(slower: float, verdict: str) -> None:
    assert found(result(keep=slower - 1e-9), "keep / stock, load").verdict == verdict


def test_too_few_repeats_are_no_measurement() -> None:
    series = result()
    for which in ("samples", "memory"):
        series[which] = [s for s in series[which] if s["repeat"] < 20]
    assert found(series, "keep / stock, load").verdict == "not run (19 repeats, not 20)"
    assert "not run" in found(series, "keep / stock, peak memory of the load").verdict


def test_memory_above_stocks_misses() -> None:
    series = result()
    assert found(series, "keep / stock, peak memory of the load").verdict == "met"
    for s in series["memory"]:
        if s["variant"] == KEEP:
            s["peak"]["load_state_dict"] = 2001
    assert found(series, "keep / stock, peak memory of the load").verdict == "missed"


def test_the_bytes_that_are_read_have_to_be_exact() -> None:
    series = result()
    one = found(series, "reset / stock, bytes of the tensors read")
    assert (one.found, one.target, one.verdict) == ("6/14", "6/14", "met")
    assert found(series, "reset v / stock, bytes of the tensors read").found == "10/14"
    fp32 = replace(CASE, dtype="fp32")
    assert found(series, "reset / stock, bytes of the tensors read", fp32).target == "8/16"
    for s in series["samples"]:
        s["payload"] += s["variant"] == RESET
    assert found(series, "reset / stock, bytes of the tensors read").verdict == "missed"


def test_another_step_misses() -> None:
    series = result()
    series["step"][KEEP] = {"function": "step", "collectives": {"all_reduce": [1, 8]}}
    assert found(series, "the step's function and collectives").verdict == "missed"


def test_the_model_finds_the_constants_it_was_made_with() -> None:
    series = []
    for million in (10, 30, 100):
        one, (_, layers) = result(), cases.SIZES[million]
        one["parameters"] = million * 10**6
        for s in one["samples"]:
            s["stored"] = (6 if s["variant"] == RESET else 14) * one["parameters"]
            moved = model.PASSES.get(s["variant"], 0) * one["parameters"]
            layer, speed = (0.02, 2e9) if s["variant"] == STOCK else (0.007, 3e9)
            read = layer * layers + s["stored"] / speed
            s["seconds"] = {"read": read, "load_state_dict": moved / 5e9}
        series.append((replace(CASE, size=million), one))
    fit = model.fit(series)
    assert (fit.stock.layer, fit.stock.read) == pytest.approx((0.02, 2e9))
    assert (fit.ours.layer, fit.ours.read, fit.moved) == pytest.approx((0.007, 3e9, 5e9))
    assert len(fit.residuals) == 12
    assert all(m == pytest.approx(p) for _, m, p in fit.residuals)


def test_the_transform_is_a_smaller_share_the_more_gpus_share_it() -> None:
    few, many = (model.predict(1e12, model.Cluster(n)) for n in (1024, 16384))
    assert few.transform == pytest.approx(16 * many.transform)
    assert few.read_reset / few.read_keep == pytest.approx(6 / 14)
    assert 0 < many.share < few.share < 0.01


def test_one_rank_of_a_trillion_parameters() -> None:
    """Against sums over the layers written down here once more."""
    moe = Moe(layers=8, hidden=32, experts=12, expert_ffn=16, vocabulary=64, pipeline=4, expert=4)
    expert = 32 * 32 + 32 * 16
    layer = 32 + 96 * 32 + 32 * 32 + 32 + 12 * 32 + 12 * expert
    assert moe.elements == 8 * layer + 2 * 64 * 32 + 32
    small = simulate(moe)
    assert small["planned"] == moe.elements
    assert small["of experts"] == small["of experts, closed form"] == 8 * 12 * expert
    assert small["of experts, twice as many"] == 2 * small["of experts"]
    assert small["elements on this rank"] == 2 * (layer - 9 * expert) + 64 * 32
    large = simulate()
    assert 0.99e12 < large["parameters"] < 1.01e12
    assert large["ranks"] == 16384
    assert large["planned"] == large["parameters"]
    assert large["bytes"] < 500e6
    assert large["agreement"] == 40


def test_a_result_becomes_tables_and_a_picture(tmp_path: Path) -> None:
    from dataclasses import asdict

    content = {
        "device": "cpu",
        "facts": {"date": "2026-11-24", "CPU": "a <processor>"},
        "series": [
            {"case": asdict(CASE), **result()},
            {"case": asdict(replace(CASE, size=30)), **result()},
        ],
        "failed": ["torch, bf16, 10M, 2 ranks"],
        "scale": simulate(Moe(layers=4, pipeline=4, expert=4, experts=4)),
    }
    files = report.write(tmp_path, "some-resume", content)
    assert [f.suffix for f in files] == [".json", ".md", ".png"]
    assert files[2].read_bytes().startswith(b"\x89PNG")
    text = files[1].read_text()
    for case in (CASE, replace(CASE, size=30)):
        for variant in VARIANTS:
            assert f"\n## {case}\n" in text
            assert f"\n| {variant.name} | " in text
    assert "| 6/14 | 6/14 | met |" in text
    assert "- FAILED, not in the tables: torch, bf16, 10M, 2 ranks\n" in text
    before = (
        "# Title\n<!-- figures of benchmarks/resume -->\nstale\n<!-- end of figures -->\nafter\n"
    )
    filled = page.filled(before, files[0])
    assert filled.startswith("# Title\n<!-- figures of benchmarks/resume -->\n2026-11-24, a <proc")
    assert filled.endswith("<!-- end of figures -->\nafter\n")
    assert "stale" not in filled
    assert page.filled(filled, files[0]) == filled
    with pytest.raises(ValueError, match="expected"):
        page.filled("nothing", files[0])


def test_the_page_has_the_figures_of_the_newest_result() -> None:
    newest = page.newest()
    assert newest is not None
    text = PAGE.read_text()
    assert page.filled(text, newest) == text
    content = json.loads(newest.read_text())
    assert {c.format for c, _ in report.series_of(content)} == set(cases.FORMATS)


def test_the_page_has_the_figures_of_the_newest_kernel_results() -> None:
    text = PAGE.read_text()
    assert markers.filled(text, "kernel", list(kernel_page.lines())[:-1]) == text
