"""From Megatron-style flags to a request."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_ext import arguments, host
from megatron_ext.errors import PolicyError
from megatron_ext.policy import ResumePolicy


def parse(*argv: str) -> argparse.Namespace:
    return arguments.add_flags(argparse.ArgumentParser(allow_abbrev=False)).parse_args(argv)


def test_without_flags_no_class_is_asked_for_and_nothing_is_kept() -> None:
    request = arguments.request_from_args(parse())
    assert request.optimizer_class is None
    assert request.policy == ResumePolicy()
    assert request.report_dir is None


def test_every_flag_reaches_the_request() -> None:
    args = parse(
        "--optimizer-class",
        "my.module.Adam",
        "--selective-keep-hyperparameters",
        "betas",
        "eps",
        "--selective-report",
        "out/report",
    )
    assert arguments.request_from_args(args) == host.Request(
        "my.module.Adam", ResumePolicy(("betas", "eps"), "args"), Path("out/report")
    )


@pytest.mark.parametrize(("given", "schedule"), [(True, "checkpoint"), (False, "args")])
def test_megatrons_own_flag_decides_the_schedule(given: bool, schedule: str) -> None:
    args = parse("--optimizer-class", "a.B")
    args.use_checkpoint_opt_param_scheduler = given
    assert arguments.request_from_args(args).policy.schedule == schedule


def test_a_namespace_that_lacks_the_optional_flags_is_enough() -> None:
    args = argparse.Namespace(optimizer_class="a.B", selective_keep_hyperparameters=None)
    assert arguments.request_from_args(args) == host.Request("a.B", ResumePolicy(), None)


def test_a_key_that_cannot_be_kept_is_refused_while_the_flags_are_read() -> None:
    args = parse("--optimizer-class", "a.B", "--selective-keep-hyperparameters", "lr")
    with pytest.raises(PolicyError, match="'lr' cannot be kept"):
        arguments.request_from_args(args)


def test_keys_separated_by_commas_are_refused_with_the_right_form() -> None:
    args = parse("--optimizer-class", "a.B", "--selective-keep-hyperparameters", "betas,eps")
    with pytest.raises(PolicyError, match=r"'betas,eps' is not a param_group key.*by spaces"):
        arguments.request_from_args(args)


def test_the_flag_needs_at_least_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--selective-keep-hyperparameters")
    assert "expected at least one argument" in capsys.readouterr().err


def test_adding_the_flags_twice_is_adding_them_once() -> None:
    parser = argparse.ArgumentParser()
    assert arguments.add_flags(parser) is parser
    once = parser.format_help()
    assert arguments.add_flags(parser) is parser
    assert parser.format_help() == once


def test_the_help_names_every_flag_and_the_default_class() -> None:
    text = " ".join(arguments.add_flags(argparse.ArgumentParser()).format_help().split())
    assert "selective resume (megatron_ext)" in text
    for flag in ("--optimizer-class PATH", "--selective-keep-hyperparameters KEY"):
        assert flag in text
    assert "--selective-report DIR" in text
    assert "megatron_ext.SelectiveAdam" in text
    assert "Without it nothing changes." in text


def test_add_arguments_prepares_megatron_and_adds_the_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(host, "install", lambda: calls.append("install"))
    parser = argparse.ArgumentParser()
    assert arguments.add_arguments(parser) is parser
    assert calls == ["install"]
    assert parser.parse_args(["--optimizer-class", "a.B"]).optimizer_class == "a.B"
