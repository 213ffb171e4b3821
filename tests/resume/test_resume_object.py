"""`Resume`: the optimizers of a chain report together, once, and a later resume starts anew."""

from __future__ import annotations

import argparse
import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.base.log import say
from megatron_ext.errors import CheckpointError
from megatron_ext.hooks import preflight
from megatron_ext.policy.flags import add_flags
from megatron_ext.report import files
from megatron_ext.report.model import OptimizerReport
from megatron_ext.resume.session import Resume
from tests.support.reports import optimizer_report, scheduler_section


def reports(*steps: int) -> list[OptimizerReport]:
    return [replace(optimizer_report(step=s), kind=f"optimizer at {s}") for s in steps]


def chain(length: int, report_dir: Path | None = None) -> tuple[Resume, list[object]]:
    write = None if report_dir is None else files.writer(report_dir)
    resume = Resume(megatron="0.19.2", write_report=write)
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
    assert (earlier is None, resume.report) == (False, None)
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


def test_each_load_names_its_report_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume, (only,) = chain(1, tmp_path)
    for step in (1, 2):
        with resume.loading():
            resume.done(only, reports(step)[0])
            resume.scheduler_loaded(scheduler_section())
        written = json.loads((tmp_path / "resume-report.json").read_text())
        assert written["optimizers"][0]["step"]["value"] == step
        assert written["scheduler"] == scheduler_section()
        assert capsys.readouterr().out.count("resume report written to") == 1


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


@pytest.mark.parametrize("obstacle", ["a file in its place", "a full disk"])
def test_a_report_that_cannot_be_written_does_not_end_the_run(
    obstacle: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "report"
    if obstacle == "a file in its place":
        directory.write_text("")
    resume, (member,) = chain(1, directory)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        resume.done(member, optimizer_report())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert resume.complete
    assert "WARNING: the resume report could not be written: [Errno" in capsys.readouterr().out
    assert [*tmp_path.rglob("*.tmp")] == []


def test_a_directory_in_which_nothing_can_be_written_is_refused_before_the_load(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    words = ["--optimizer-class", "megatron_ext.SelectiveAdam", "--selective-report"]
    parser = add_flags(argparse.ArgumentParser())
    error = preflight._report_error(parser.parse_args([*words, str(tmp_path / "file")]))
    assert str(error).startswith(f"--selective-report {tmp_path / 'file'}: expected a directory")
    for directory in (tmp_path, tmp_path / "new" / "one"):
        assert preflight._report_error(parser.parse_args([*words, str(directory)])) is None
        assert not [p for p in directory.iterdir() if p.suffix == ".tmp"]


def test_what_a_checkpoint_says_reaches_no_terminal_raw(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A phase's name or a group's key may hold a terminal's escapes."""
    say(["phase \x1b[2J\x07", "next"])
    assert capsys.readouterr().out == "phase \\x1b[2J\\x07\nnext\n"
    error = CheckpointError("group 'a\x1b]0;b\x07'\nnext line")
    assert str(error) == "group 'a\\x1b]0;b\\x07'\nnext line"
