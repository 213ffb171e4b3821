"""`Resume`: the optimizers of a chain report together, once, and a later resume starts anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext import report_plots
from megatron_ext.host import loading
from megatron_ext.report import OptimizerReport
from megatron_ext.resume import Resume
from tests.support.reports import optimizer_report, scheduler_section


def reports(*steps: int) -> list[OptimizerReport]:
    return [replace(optimizer_report(step=s), kind=f"optimizer at {s}") for s in steps]


def chain(length: int, report_dir: Path | None = None) -> tuple[Resume, list[object]]:
    resume = Resume(megatron="0.19.2", report_dir=report_dir)
    members = [object() for _ in range(length)]
    for member in members:
        resume.join(member)
    return resume, members


def test_a_resume_nobody_joined_is_not_complete() -> None:
    assert Resume().complete is False
    assert Resume().report is None


def test_the_report_waits_for_the_last_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    resume, (first, second) = chain(2)
    one, other = reports(1, 2)
    resume.done(second, other)
    assert (resume.complete, resume.report) == (False, None)
    assert capsys.readouterr().out == ""
    resume.done(first, one)
    assert resume.complete is True
    assert resume.report is not None
    assert resume.report.megatron == "0.19.2"
    assert resume.report.optimizers == [one, other]
    assert capsys.readouterr().out.splitlines() == resume.report.lines()


def test_members_that_compare_equal_are_told_apart() -> None:
    resume = Resume()
    first, second = [1], [1]
    resume.join(first)
    resume.join(second)
    one, other = reports(1, 2)
    resume.done(second, other)
    assert resume.complete is False
    resume.done(first, one)
    assert resume.report is not None
    assert resume.report.optimizers == [one, other]


def test_a_second_resume_replaces_the_first_one_as_a_whole() -> None:
    resume, (first, second) = chain(2)
    for member, report in zip((first, second), reports(1, 2), strict=True):
        resume.done(member, report)
    earlier = resume.report
    three, four = reports(3, 4)
    resume.done(first, three)
    assert resume.complete is False
    assert resume.report is earlier
    resume.done(second, four)
    assert resume.report is not None
    assert resume.report.optimizers == [three, four]


def test_an_optimizer_that_loads_again_before_the_others_counts_once() -> None:
    resume, (first, second) = chain(2)
    one, again, other = reports(1, 2, 3)
    resume.done(first, one)
    resume.done(first, again)
    assert resume.complete is False
    resume.done(second, other)
    assert resume.report is not None
    assert resume.report.optimizers == [again, other]


def test_the_scheduler_is_added_to_the_report_and_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume, (only,) = chain(1, tmp_path)
    resume.done(only, reports(100)[0])
    path = tmp_path / "resume-report.json"
    assert json.loads(path.read_text())["scheduler"] is None
    assert f"megatron_ext: resume report written to {path}" in capsys.readouterr().out

    section = scheduler_section()
    resume.scheduler_loaded(section)
    assert json.loads(path.read_text())["scheduler"] == section
    assert json.loads(path.read_text())["optimizers"][0]["step"]["value"] == 100
    assert "first resumed step, optimizer 0 group 0" in capsys.readouterr().out


@pytest.mark.parametrize("scheduler", [True, False])
def test_the_page_is_drawn_once_a_load_and_of_the_whole_report(
    scheduler: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    drawn: list[Any] = []
    draw = report_plots.draw

    def noted(document: Any) -> report_plots.Plots:
        drawn.append(document)
        return draw({})

    monkeypatch.setattr(report_plots, "draw", noted)
    resume, (only,) = chain(1, tmp_path)
    for number in (1, 2):
        resume.begin_load()
        resume.done(only, reports(number)[0])
        names = sorted(p.name for p in tmp_path.iterdir())
        assert names == ["resume-report.json", "resume-report.txt"]  # and no earlier load's page
        if scheduler:
            resume.scheduler_loaded(scheduler_section())
        resume.end_load()
        assert len(drawn) == number
        assert (drawn[-1]["scheduler"] is not None) == scheduler
        assert (tmp_path / "resume-report.html").is_file()
    assert capsys.readouterr().out.count("resume report written to") == 1


def test_a_load_without_a_scheduler_has_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume, (only,) = chain(1, tmp_path)
    monkeypatch.setattr(loading, "members_of", lambda optimizer: [SimpleNamespace(resume=resume)])
    monkeypatch.setattr(loading, "global_args", lambda: SimpleNamespace(load=str(tmp_path)))
    for name in ("_require_legacy_files", "_loaded_iteration"):
        monkeypatch.setattr(loading, name, lambda *args: 0)
    monkeypatch.setattr(loading.loop, "after_the_load", lambda *args: None)
    monkeypatch.setattr(loading.state, "resumed", None)

    @loading.load_checkpoint
    def load(model: Any, optimizer: Any, scheduler: Any) -> tuple[int, int]:
        resume.done(only, reports(1)[0])
        return 10, 0

    assert load(None, only, None) == (10, 0)
    assert (tmp_path / "resume-report.html").is_file()


def test_a_load_that_brings_no_optimizer_writes_nothing(tmp_path: Path) -> None:
    resume, (only,) = chain(1, tmp_path)
    resume.begin_load()
    resume.done(only, reports(1)[0])
    resume.end_load()
    (tmp_path / "resume-report.html").unlink()
    resume.begin_load()
    resume.end_load()
    assert not (tmp_path / "resume-report.html").exists()


def test_a_scheduler_without_a_resume_is_no_news(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume, _ = chain(1, tmp_path)
    resume.scheduler_loaded(scheduler_section())
    assert resume.report is None
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_without_a_directory_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    resume, (only,) = chain(1)
    resume.done(only, reports(1)[0])
    resume.scheduler_loaded(scheduler_section())
    assert resume.report is not None
    assert resume.report.scheduler == scheduler_section()
    assert list(tmp_path.iterdir()) == []
