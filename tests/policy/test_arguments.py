"""From Megatron-style flags to a request."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ext import api
from megatron_ext.errors import PolicyError
from megatron_ext.hooks import installing
from megatron_ext.policy import from_flags
from megatron_ext.policy.flags import add_flags, given_without_class
from megatron_ext.policy.match import GroupRule, Match, MomentRule
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import Preset
from megatron_ext.policy.request import Request
from megatron_ext.rules.elementwise import KEEP, Scale
from megatron_ext.rules.fill_from import FillFrom


def parse(*argv: str) -> argparse.Namespace:
    return add_flags(argparse.ArgumentParser(allow_abbrev=False)).parse_args(argv)


def test_without_flags_no_class_is_asked_for_and_nothing_is_kept() -> None:
    request = from_flags.request_from_args(parse())
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
    assert from_flags.request_from_args(args) == Request(
        "my.module.Adam", ResumePolicy(("betas", "eps"), "args"), Path("out/report")
    )


@pytest.mark.parametrize(("given", "schedule"), [(True, "checkpoint"), (False, "args")])
def test_megatrons_own_flag_decides_the_schedule(given: bool, schedule: str) -> None:
    args = parse("--optimizer-class", "a.B")
    args.use_checkpoint_opt_param_scheduler = given
    assert from_flags.request_from_args(args).policy.schedule == schedule


def test_a_namespace_that_lacks_the_optional_flags_is_enough() -> None:
    args = argparse.Namespace(optimizer_class="a.B", selective_keep_hyperparameters=None)
    assert from_flags.request_from_args(args) == Request("a.B", ResumePolicy(), None)


def test_a_key_that_cannot_be_kept_is_refused_while_the_flags_are_read() -> None:
    args = parse("--optimizer-class", "a.B", "--selective-keep-hyperparameters", "lr")
    with pytest.raises(PolicyError, match="'lr' cannot be kept"):
        from_flags.request_from_args(args)


def test_keys_separated_by_commas_are_refused_with_the_right_form() -> None:
    args = parse("--optimizer-class", "a.B", "--selective-keep-hyperparameters", "betas,eps")
    with pytest.raises(PolicyError, match=r"'betas,eps' is not a param_group key.*by spaces"):
        from_flags.request_from_args(args)


def test_the_flag_needs_at_least_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--selective-keep-hyperparameters")
    assert "expected at least one argument" in capsys.readouterr().err


def test_adding_the_flags_twice_is_adding_them_once() -> None:
    parser = argparse.ArgumentParser()
    assert add_flags(parser) is parser
    once = parser.format_help()
    assert add_flags(parser) is parser
    assert parser.format_help() == once


def test_the_help_names_every_flag_and_the_default_class() -> None:
    parser = add_flags(argparse.ArgumentParser())
    text = " ".join(parser.format_help().split())
    assert "selective resume (megatron_ext)" in text
    for flag in ("--optimizer-class PATH", "--selective-keep-hyperparameters KEY"):
        assert flag in text
    assert "--selective-report DIR" in text
    assert "--selective-policy FILE" in text
    for destination in vars(parser.parse_args([])).keys() - {"selective_strict", "selective_guard"}:
        assert re.search(rf"--{destination.replace('_', '-')}[ \]]", text)
    for words in (
        "Directory from which a phase starts",
        "The same command line then restarts the phase.",
        "Count the iterations from 0 again. This happens once",
        "Read the data from its beginning again. This happens once",
        "Default: restart with --reset-iteration, else continue.",
    ):
        assert words in text
    assert "--no-selective-strict" in text
    assert "--no-selective-guard" in text
    for form in ("batch-size OLD NEW", "relora P", "fill column-mean", "prune-random P [seed N]"):
        assert form in text
    assert "megatron_ext.SelectiveAdam" in text
    assert "Without it nothing changes." in text


def test_add_arguments_prepares_megatron_and_adds_the_flags(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(installing, "install", lambda: calls.append("install"))
    parser = argparse.ArgumentParser()
    assert api.add_arguments(parser) is parser
    assert calls == ["install"]
    assert parser.parse_args(["--optimizer-class", "a.B"]).optimizer_class == "a.B"


def policy(*argv: str) -> ResumePolicy:
    return from_flags.request_from_args(parse(*argv)).policy


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--selective-hyperparameters checkpoint", {"hyperparameters": "checkpoint"}),
        (
            "--selective-hyperparameters checkpoint --selective-take-hyperparameters eps betas",
            {"hyperparameters": "checkpoint", "take_hyperparameters": ("eps", "betas")},
        ),
        ("--selective-preset reset", {"preset": Preset("reset")}),
        ("--selective-preset relora 0.9", {"preset": Preset("relora", (0.9,))}),
        (
            "--selective-preset batch-size 256 1024 --selective-decline lr eps",
            {"preset": Preset("batch-size", (256, 1024), ("lr", "eps"))},
        ),
        ("--selective-step keep", {"step": "keep"}),
        ("--selective-step reset", {"step": "reset"}),
        ("--selective-step 1000", {"step": 1000}),
        ("--selective-nonfinite reset", {"nonfinite": "reset"}),
        ("--selective-master-weights model", {"master_weights": "model"}),
        ("--no-selective-strict", {"strict": False}),
        ("--selective-schedule continue", {"schedule_position": "continue"}),
        ("--selective-schedule restart", {"schedule_position": "restart"}),
        ("--selective-grad-scaler reset", {"grad_scaler": "reset"}),
        ("--selective-grad-scaler keep", {}),
        ("--reset-iteration", {"reset_iteration": True}),
        ("--reset-dataloader", {"reset_dataloader": True}),
        ("--selective-phase long-context_2.1", {"phase": "long-context_2.1"}),
    ],
)
def test_every_flag_of_a_policy_by_itself(argv: str, expected: dict) -> None:
    assert policy(*argv.split()) == ResumePolicy(**expected)


def test_rules_are_taken_in_the_order_given() -> None:
    found = policy(
        *("--selective-rule", "w[3:]", "keep", "fill mean"),
        *("--selective-rule", "*.bias ndim=1", "scale 0.5", "keep"),
    )
    assert found.rules == (
        MomentRule(Match("w", (3, None)), KEEP, FillFrom("mean")),
        MomentRule(Match("*.bias", ndim=1), Scale(0.5), KEEP),
    )


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("a=1 keep eps", GroupRule((("a", 1),), ("eps",))),
        ("a=1 take eps betas", GroupRule((("a", 1),), (), ("eps", "betas"))),
        (
            "a=1 b=false keep eps take betas",
            GroupRule((("a", 1), ("b", False)), ("eps",), ("betas",)),
        ),
        ("a=1 take betas keep eps", GroupRule((("a", 1),), ("eps",), ("betas",))),
    ],
)
def test_a_group_rule_in_words(words: str, rule: GroupRule) -> None:
    assert policy("--selective-group-rule", *words.split()).groups == (rule,)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--selective-group-rule", "a=1"],
            "--selective-group-rule a=1: expected KEY=VALUE ... keep KEY ... take KEY ...",
        ),
        (["--selective-group-rule", "keep", "eps"], "expected at least one attribute to match"),
        (["--selective-group-rule", "a=1", "eps"], "expected KEY=VALUE ... keep KEY ..."),
        (["--selective-group-rule", "keep", "a=1", "eps"], "expected KEY=VALUE ... keep KEY ..."),
        (["--selective-group-rule", "a=1", "keep"], "expected keys to keep or to take, found none"),
        (["--selective-preset", "rest"], "unknown preset 'rest'; did you mean 'reset'?"),
        (["--selective-preset", "batch-size", "4"], "expected 'batch-size OLD NEW'"),
        (["--selective-decline", "lr"], "preset keep: 'lr' cannot be declined; it changes nothing"),
        (["--selective-rule", "w", "scal 2", "keep"], "did you mean 'scale'?"),
        (["--selective-rule", "re:(", "keep", "keep"], "not a regular expression"),
        (["--selective-rule", "", "reset", "reset"], "expected a parameter name or glob"),
        (["--selective-rule", "w", "keep", "scale -1"], "would make exp_avg_sq negative"),
        (["--selective-step", "1.5"], "--selective-step: expected keep, reset or a number"),
        (["--selective-step", "\u00b2"], "--selective-step: expected keep, reset or a number"),
        (["--selective-phase", "second phase"], "--selective-phase: expected letters, digits,"),
        (
            ["--selective-keep-hyperparameters", "eps", "--selective-take-hyperparameters", "eps"],
            "eps: in --selective-keep-hyperparameters (from the checkpoint) and in",
        ),
    ],
)
def test_flags_that_make_no_sense_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(message)):
        policy(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        "--selective-nonfinite ignore",
        "--selective-master-weights args",
        "--selective-hyperparameters both",
        "--selective-schedule keep",
        "--selective-grad-scaler restart",
    ],
)
def test_a_choice_that_is_none_is_refused_by_the_parser(
    argv: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*argv.split())
    assert "invalid choice" in capsys.readouterr().err


# --- with a file


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        ("--selective-keep-hyperparameters eps", "--selective-keep-hyperparameters"),
        ("--selective-take-hyperparameters eps", "--selective-take-hyperparameters"),
        ("--selective-hyperparameters checkpoint", "--selective-hyperparameters"),
        ("--selective-group-rule a=1 keep eps", "--selective-group-rule"),
        ("--selective-preset reset", "--selective-preset"),
        ("--selective-decline lr", "--selective-decline"),
        ("--selective-rule w reset reset", "--selective-rule"),
        ("--selective-step 3", "--selective-step"),
        ("--selective-nonfinite keep", "--selective-nonfinite"),
        ("--selective-master-weights model", "--selective-master-weights"),
        ("--no-selective-strict", "--no-selective-strict"),
        ("--selective-schedule restart", "--selective-schedule"),
        ("--selective-grad-scaler reset", "--selective-grad-scaler"),
    ],
)
def test_a_file_and_a_flag_together_are_refused(tmp_path: Path, argv: str, flag: str) -> None:
    path = tmp_path / "phase2.yaml"
    path.write_text("preset: reset-momentum")
    with pytest.raises(PolicyError) as caught:
        policy("--selective-policy", str(path), *argv.split())
    assert str(caught.value) == (
        f"--selective-policy {path} and {flag}: expected the file or the flags. Put what the flags "
        "say into the file"
    )


def test_how_the_run_is_watched_goes_together_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "phase2.yaml"
    path.write_text("preset: reset-momentum")
    words = f"--optimizer-class a.B --selective-policy {path} --selective-dry-run"
    request = from_flags.request_from_args(parse(*words.split(), "--no-selective-guard"))
    assert request.policy == ResumePolicy(preset=Preset("reset-momentum"))
    assert (request.dry_run, request.guard) == (True, False)
    assert given_without_class(parse("--no-selective-guard")) == ["--no-selective-guard"]


@pytest.mark.parametrize(
    ("flag", "found"),
    [
        ("--selective-keep-hyperparameters", lambda p: p.keep_hyperparameters),
        ("--selective-new-parameters", lambda p: p.parameters.new),
        ("--selective-drop-parameters", lambda p: p.parameters.drop),
    ],
)
def test_a_list_may_be_given_in_parts(flag: str, found: Callable[[ResumePolicy], Any]) -> None:
    parts = policy(flag, "betas", flag, "eps", "a")
    assert found(parts) == found(policy(flag, "betas", "eps", "a")) == ("betas", "eps", "a")
    assert found(policy()) == ()


def test_the_report_and_the_class_go_together_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "phase2.yaml"
    path.write_text("preset: reset-momentum")
    args = parse(*f"--selective-policy {path} --selective-report out --optimizer-class a.B".split())
    assert from_flags.request_from_args(args) == Request(
        "a.B", ResumePolicy(preset=Preset("reset-momentum")), Path("out")
    )


@pytest.mark.parametrize("text", ["{}", "schedule: args", "schedule: checkpoint"])
def test_megatrons_own_flag_goes_together_with_a_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "phase2.yaml"
    path.write_text(text)
    args = parse("--selective-policy", str(path))
    assert from_flags.request_from_args(args).policy.schedule == (
        "checkpoint" if "checkpoint" in text else "args"
    )
    args.use_checkpoint_opt_param_scheduler = True
    assert from_flags.request_from_args(args).policy == ResumePolicy(schedule="checkpoint")


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("{}", "--selective-phase b", {"phase": "b"}),
        ("phase: b", "--selective-phase b", {"phase": "b"}),
        ("phase: b", "", {"phase": "b"}),
        ("{}", "--reset-iteration", {"reset_iteration": True}),
        ("counters: {iteration: keep}", "--reset-iteration", {"reset_iteration": True}),
        ("counters: {iteration: reset}", "", {"reset_iteration": True}),
        (
            "counters: {iteration: reset, schedule: continue}",
            "--reset-dataloader",
            {"reset_iteration": True, "reset_dataloader": True, "schedule_position": "continue"},
        ),
        ("{}", "--selective-from elsewhere", {}),
    ],
)
def test_the_phase_and_the_counters_may_stand_beside_a_file(
    tmp_path: Path, text: str, argv: str, expected: dict
) -> None:
    path = tmp_path / "phase2.yaml"
    path.write_text(text)
    found = policy("--selective-policy", str(path), *argv.split())
    assert found == ResumePolicy(**expected)


def test_two_names_for_one_phase_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "phase2.yaml"
    path.write_text("phase: a")
    with pytest.raises(PolicyError) as caught:
        policy("--selective-policy", str(path), "--selective-phase", "b")
    assert str(caught.value) == (
        "--selective-phase b: the policy file names the phase 'a'; expected one name"
    )


# --- without the class, and beside the flags of a fork


@pytest.mark.parametrize(
    ("argv", "flags"),
    [
        ("", []),
        ("--selective-from a", ["--selective-from"]),
        ("--selective-policy a", ["--selective-policy"]),
        ("--selective-phase b", ["--selective-phase"]),
        ("--selective-schedule continue", ["--selective-schedule"]),
        ("--selective-grad-scaler reset", ["--selective-grad-scaler"]),
        ("--reset-iteration --reset-dataloader", ["--reset-iteration", "--reset-dataloader"]),
        ("--no-selective-strict", ["--no-selective-strict"]),
    ],
)
def test_flags_without_the_class_are_named(argv: str, flags: list[str]) -> None:
    assert given_without_class(parse(*argv.split())) == flags
    assert given_without_class(parse("--optimizer-class", "a.B", *argv.split())) == []


def test_a_forks_own_reset_flags_are_left_as_they_are() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--reset-iteration", action="store_true", help="the fork's")
    add_flags(parser)
    text = parser.format_help()
    assert text.count("--reset-iteration\n") + text.count("--reset-iteration ") >= 1
    assert "the fork's" in text
    assert "Count the iterations from 0 again" not in text
    assert "Read the data from its beginning again" in text
    args = parser.parse_args(["--reset-iteration", "--reset-dataloader"])
    found = from_flags.request_from_args(args).policy
    assert found == ResumePolicy(reset_iteration=True, reset_dataloader=True)
    assert from_flags.request_from_args(parser.parse_args([])).policy == ResumePolicy()


def test_a_forks_flag_of_another_kind_is_refused_by_name() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--reset-iteration", type=int)
    add_flags(parser)
    assert from_flags.request_from_args(parser.parse_args([])).policy == ResumePolicy()
    with pytest.raises(PolicyError, match="reset_iteration: expected true or false, found 100"):
        from_flags.request_from_args(parser.parse_args(["--reset-iteration", "100"]))


def test_a_wrong_file_is_refused_while_the_flags_are_read(tmp_path: Path) -> None:
    path = tmp_path / "phase2.yaml"
    path.write_text("presett: reset")
    with pytest.raises(PolicyError, match="unknown key 'presett'; did you mean 'preset'"):
        policy("--selective-policy", str(path))
