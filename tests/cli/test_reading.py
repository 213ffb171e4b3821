"""What the commands print: on 80 columns, on one screen, with numbers that are the checkpoint's."""

from __future__ import annotations

import argparse
import io
import json
import math
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.cli import main, output
from megatron_ext.offline.emitted import command_of
from megatron_ext.offline.forecast import forecast
from tests.conftest import FIRST, Checkpoints
from tests.support import inspected
from tests.support.checkpoints import checkpoint
from tests.support.harness import Layout
from tests.support.planned import words
from tests.support.runs import needs_training

FULL = Layout(format="fully_reshardable")
SECOND = replace(FIRST, lr=1e-3, weight_decay=0.05, betas=(0.8, 0.9), train_iters=60)
ESCAPE = re.compile(r"\x1b\[[\d;]*m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(
    monkeypatch: pytest.MonkeyPatch, *command: Any, columns: int = 80, **env: str
) -> tuple[int, str]:
    """Exit status and output on a terminal."""
    with monkeypatch.context() as patch:
        for name, value in {"COLUMNS": str(columns), "TERM": "xterm-256color", **env}.items():
            patch.setenv(name, value)
        if "NO_COLOR" not in env:
            patch.delenv("NO_COLOR", raising=False)
        patch.setattr(sys, "stdout", screen := Terminal())
        status = main([*map(str, command)])
    return status, screen.getvalue()


def piped(capsys: pytest.CaptureFixture[str], *command: Any) -> tuple[int, str]:
    """Exit status and output where stdout is no terminal."""
    capsys.readouterr()
    status = main([*map(str, command)])
    return status, capsys.readouterr().out


@pytest.fixture
def phases(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """Two real checkpoints, and one by buckets, under short names in the current directory."""
    for name, layout, hyper in (
        ("one", FULL, FIRST),
        ("two", FULL, SECOND),
        ("buckets", Layout(), FIRST),
    ):
        (tmp_path / name).symlink_to(checkpoints.phase_1(layout, 2, hyper)[0])
    monkeypatch.chdir(tmp_path)
    return "one", "two"


# --- on 80 columns


@pytest.mark.ranks
def test_every_output_fits_80_columns(
    phases: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = words(SECOND)
    reset = "--selective-preset reset --selective-rule *mlp* keep reset".split()
    stacked = [*changed, "--selective-preset", "rest", "--lr-warmup-iters", 90]
    commands: dict[tuple[Any, ...], int] = {
        ("env",): 0,
        ("verify", "one"): 0,
        ("inspect", "one"): 0,
        ("inspect", "one", "--moments", "--top", 99): 0,
        ("diff", "one", "two", "--moments", "--top", 99): 1,
        ("plan", "one", *changed): 0,
        ("plan", "one", *changed, *reset, "--full"): 1,
        ("plan", "one", *changed, *reset, "--emit-policy"): 1,
        ("plan", "one", *stacked): 2,
        ("convert", "buckets", "converted", "--to", "fully_reshardable"): 0,
        ("edit", "one", "--out", "edited", "--set", "max_lr=1e-3"): 0,
    }
    shown = {}
    for command, status in commands.items():
        found, text = on_terminal(monkeypatch, *command)
        assert found == status, command
        lines = ESCAPE.sub("", text).splitlines()
        assert lines, command
        assert [line for line in lines if len(line) > 80] == [], command
        shown[command[:2]] = shown.get(command[:2], "") + text
    # Beside numbers a long name loses its middle, and no line is only a part of one.
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", document := io.StringIO())
        main(["inspect", "one", "--moments", "--json"])
    stored = {s["name"] for s in json.loads(document.getvalue())["statistics"]}
    printed = ESCAPE.sub("", shown["inspect", "one"])
    shortened = re.findall(r"^  ([\w.]+)\u2026([\w.]+) +\d", printed, re.MULTILINE)
    assert len(shortened) > 3
    for begin, end in shortened:
        assert any(name.startswith(begin) and name.endswith(end) for name in stored)
    assert not re.search(r"^ *[\w.]*(_norm|weight|bias)[\w.]*$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [("abcdef", 6, "abcdef"), ("abcdefg", 6, "ab\u2026efg"), ("abcdefg", 5, "ab\u2026fg")],
)
def test_a_name_is_shortened_in_the_middle(name: str, width: int, expected: str) -> None:
    assert output.shortened(name, width) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0"),
        (999, "999"),
        (1536, "1.536k"),
        (328_704, "328.7k"),
        (999_949, "999.9k"),
        (999_950, "1M"),
        (7 * 10**14, "700T"),
        (2 * 10**18, "2000000000000000000"),
    ],
)
def test_a_large_count_has_four_digits(count: int, expected: str) -> None:
    assert output.large(count) == expected


# --- colour


@pytest.mark.ranks
def test_escape_codes_are_for_terminals_only(
    phases: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("plan", "one", *words(SECOND), "--selective-preset", "reset")
    _, coloured = on_terminal(monkeypatch, *command, columns=200)
    assert "\x1b[1;32mTRANSITION" in coloured
    assert "\x1b[33mWARNING" in coloured
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        assert "\x1b" not in on_terminal(monkeypatch, *command, columns=200, **env)[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, text = piped(capsys, *command)
    assert "\x1b" not in text
    # The same words, whether they are folded or not.
    assert ESCAPE.sub("", coloured).split() == text.split()


# --- plan


@pytest.mark.ranks
def test_a_plan_is_twelve_lines_with_the_numbers_of_the_checkpoint(
    phases: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = ["--selective-keep-hyperparameters", "eps"]
    command = ["plan", "one", *words(replace(SECOND, eps=1e-6)), *keep]
    status, text = on_terminal(monkeypatch, *command, NO_COLOR="1")
    lines = text.splitlines()
    assert status == 0
    assert 8 <= len(lines) <= 14, text
    assert lines[0] == "RESUME: no one-time operation requested"
    rows = dict(line.split(None, 1) for line in lines[1:-1])
    saved = json.loads(piped(capsys, "inspect", "one", "--json")[1])["optimizers"][0]["groups"]
    step = json.loads(piped(capsys, *command, "--json")[1])["scheduler"]["first_step"][0]
    old, new = saved[0]["lr"], step["lr"]
    assert rows["first"] == f"lr      {old:.4g} -> {new:.4g} ({new / old:.3g}x)"
    assert rows["weight"] == "decay  0.1 -> 0.05 (0.5x) (group 0)"
    assert rows["max_lr"] == "0.003 -> 0.001"
    assert rows["betas"] == "(0.9, 0.95) -> (0.8, 0.9)"
    assert rows["eps"] == "1e-08 kept, not 1e-06 (--selective-keep-hyperparameters eps)"
    assert rows["moments"] == "kept, step 4"
    assert "min_lr" not in rows  # it does not change
    assert lines[-1].startswith("next: ")
    assert lines[-1].endswith("prints the torchrun line")
    _, whole = on_terminal(monkeypatch, *command, "--full", NO_COLOR="1")
    assert whole.startswith("\n".join(lines[:4]))
    assert "min_lr" in whole


def test_the_next_command_has_the_words_that_were_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "my run", changes={"lr": 3e-3, "train_iters": 100})
    given = ["--iteration", "10", str(root), "--lr", "1e-3"]
    _, text = piped(capsys, "plan", *given)
    (line,) = re.findall(r"^next: (.*)", text, re.MULTILINE)
    begin = ["python", "-m", "megatron_ext", "plan"]
    assert shlex.split(line) == [*begin, *given, "--emit-command"]


def test_a_refusal_is_the_verdict_and_the_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100})
    command = ["plan", root, "--lr-warmup-iters", 50, "--lr-decay-iters", 40]
    status, text = piped(capsys, *command, "--selective-preset", "rest")
    first, *problems = text.splitlines()
    assert status == 2
    assert first == "REFUSED: the run would stop before its first step; 2 problems"
    assert [p[:3] for p in problems] == ["1. ", "2. "]
    assert "did you mean 'reset'?" in problems[0]
    assert "--lr-warmup-iters 50" in problems[1]


def test_many_warnings_keep_their_first_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100}, lr=1e-5)
    command = ["plan", root, "--selective-preset", "reset", "--weight-decay", 0.9]
    _, document = piped(capsys, *command, "--json")
    warnings = json.loads(document)["warnings"]
    assert len(warnings) > 2
    _, text = piped(capsys, *command)
    _, whole = piped(capsys, *command, "--full")
    for warning in warnings:
        assert f"WARNING: {warning}\n" in whole
        (line,) = [one for one in text.splitlines() if one[9:] and warning.startswith(one[9:])]
        assert len(line[9:].split()) > 3
    assert "To go on at the last value" in whole
    assert "To go on at the last value" not in text


POLICIES = {
    "keep": "",
    "keys": "--selective-keep-hyperparameters eps betas --selective-group-rule wd_mult=0.0 keep "
    "max_lr take betas",
    "rules": "--selective-preset gradient-scale 0.5 --selective-decline eps --selective-rule "
    "'*.linear_fc2.weight[3:9] ndim=2' reset 'fill column-mean' --selective-step 2",
    "counters": "--reset-iteration --selective-schedule continue --selective-phase p.2",
    "checkpoint": "--use-checkpoint-opt_param-scheduler --selective-hyperparameters checkpoint "
    "--selective-take-hyperparameters eps --selective-nonfinite reset",
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", POLICIES)
def test_the_emitted_policy_gives_the_same_plan(
    name: str, phases: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    given, flags = words(replace(SECOND, eps=1e-6)), shlex.split(POLICIES[name])
    status, text = piped(capsys, "plan", "one", *given, *flags, "--emit-policy")
    Path("policy.yaml").write_text(text)
    plans = [
        piped(capsys, "plan", "one", *given, *more, "--json")
        for more in (flags, ["--policy", "policy.yaml"])
    ]
    assert [plan[0] for plan in plans] == [status, status]
    by_flags, by_file = (json.loads(plan[1]) for plan in plans)
    assert by_flags.pop("arguments") is not None
    assert by_file.pop("arguments") is not None
    assert by_file == by_flags
    assert by_flags["outcome"] != "refused"
    assert (text == "{}\n") == (name == "keep")


@pytest.mark.parametrize("option", ["--emit-policy", "--emit-command"])
def test_nothing_is_emitted_for_a_refusal(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100})
    assert main(["plan", str(root), "--selective-preset", "rest", option]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: unknown preset 'rest'")
    assert main(["plan", str(root), "--json", option]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"error: --json and {option}: expected one of them")


@needs_training
@pytest.mark.matrix
@pytest.mark.parametrize("world", [2, 8, 24])
def test_the_emitted_command_has_the_arguments_of_the_checkpoint(
    world: int, tmp_path: Path
) -> None:
    """Parsed by Megatron, all are the saved ones, but for those that were given."""
    from megatron_ext.host.arguments import megatron_parser

    parser = megatron_parser("", "")
    saved = parser.parse_args(
        "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --micro-batch-size 2 --bf16 "
        "--global-batch-size 8 --train-samples 800 --lr-decay-samples 800 --lr 3e-3 --seed 7 "
        "--no-masked-softmax-fusion --attention-backend fused --rampup-batch-size 2 2 100 "
        "--data-path 0.5 a/b 0.5 c --untie-embeddings-and-output-weights --load x --save y "
        "--lr-decay-style WSD --lr-wsd-decay-samples 80 --use-distributed-optimizer "
        "--init-method-std 0.5 --no-load-rng --finetune --moe-layer-freq [0,1]".split()
    )
    validated = {"world_size": world, "train_iters": 100, "encoder_num_layers": 2}
    validated |= {"start_weight_decay": 0.01, "end_weight_decay": 0.01, "padded_vocab_size": 128}
    changes = {**vars(saved), **validated, "consumed_train_samples": 80}
    root = checkpoint(tmp_path / "one", changes=changes)
    given = ["--lr", "1e-3", "--global-batch-size", "16", "--save", "new dir"]
    text, notes = command_of(forecast(root, given), given)
    assert all(len(line) <= 80 for line in text.splitlines() if str(root) not in line)
    torchrun, _, rest = text.replace("\\\n", " ").partition("pretrain_gpt.py")
    expected = ["--nnodes", "3", "--nproc-per-node", "8", "--rdzv-backend", "c10d"]
    expected += ["--rdzv-endpoint", "$MASTER_ADDR:29500"]
    start = expected if world == 24 else ["--nproc-per-node", str(world)]
    assert shlex.split(torchrun) == ["torchrun", *start, "-m", "megatron_ext.launch"]
    found, others = parser.parse_known_args(shlex.split(rest))
    assert others == ["--optimizer-class", "megatron_ext.SelectiveAdam"]
    differing = {k for k, v in vars(saved).items() if getattr(found, k) != v}
    assert differing == {"lr", "global_batch_size", "save", "load", "finetune", "no_load_rng"}
    assert (found.lr, found.global_batch_size, found.save) == (1e-3, 16, "new dir")
    assert (found.load, found.train_iters) == (str(root), None)
    assert len(notes) == (2 if world == 24 else 1)


@needs_training
def test_a_command_of_unknown_arguments_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100})
    found = f"error: --emit-command: expected the arguments of a Megatron-LM run in {root}/iter_"
    assert main(["plan", str(root), "--emit-command"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    error = told.err.splitlines()[-1]
    assert error.startswith(found)
    assert "found no --hidden-size, --num-attention-heads, --micro-batch-size. Give" in error
    whole = "--num-layers 2 --micro-batch-size 1 --global-batch-size 8 --my-flag 3 --lr 1e-3 "
    whole = [*whole.split(), "--train-iters", "100", "--use-distributed-optimizer"]
    assert main(["plan", str(root), *whole, "--emit-command"]) == 1
    told = capsys.readouterr().out
    (emitted,) = re.findall(r"pretrain_gpt.py (.*)", told.replace("\\\n", " "))
    ours = ["--optimizer-class", "megatron_ext.SelectiveAdam", "--load", str(root)]
    assert shlex.split(emitted) == [*whole, *ours]
    (root / "iter_0000010" / "run_config.yaml").touch()
    assert main(["plan", str(root), "--emit-command"]) == 2
    assert "found the run_config.yaml of Megatron-Bridge. Give" in capsys.readouterr().err


# --- inspect and diff


@pytest.fixture
def tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven second moments whose order differs by RMS, largest value and non-finite elements."""
    values = {f"layer.{i}.weight": torch.full((4, 4), float(i + 1)) for i in range(6)}
    values["layer.2.weight"][0, 0] = 50.0  # RMS 12.84..., the largest
    values["layer.1.weight"][0, :2] = math.nan
    values["layer.1.weight"][1, 0] = -1.0
    values["head.weight"] = torch.full((8,), 20.0)
    states = {f"optimizer.state.exp_avg_sq.{name}": v for name, v in values.items()}
    monkeypatch.chdir(tmp_path)
    return inspected.store(tmp_path / "ck", states)


def names(text: str) -> list[str]:
    return re.findall(r"^  ((?:layer|head)[\w.]*) ", text, re.MULTILINE)


def test_moments_are_sorted_and_chosen(tensors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = piped(capsys, "inspect", "ck", "--moments")
    assert status == 1
    total = 16 * (1 + 16 + 25 + 36) + (13 * 4 + 1) + (15 * 9 + 2500) + 8 * 400
    (line,) = re.findall(r"^exp_avg_sq: .*", text, re.MULTILINE)
    rms = f"{math.sqrt(total / 104):.4g}"
    assert line == (
        f"exp_avg_sq: 7 tensors, 104 elements, RMS {rms}, largest 50, 3 not finite in 1 of them"
    )
    # What Adam cannot use comes first, whatever the order.
    bad, by_rms = "layer.1.weight", ["head.weight", "layer.2.weight", "layer.5.weight"]
    assert names(text) == [bad, *by_rms, "layer.4.weight"]
    assert "  2 more: --top 7\n" in text
    (row,) = re.findall(r"^  layer\.2\.weight +(.*)", text, re.MULTILINE)
    assert row.split() == ["16", f"{math.sqrt((15 * 9 + 2500) / 16):.4g}", "50", "0"]
    for more, expected in (
        (["--by", "max", "--top", 3], [bad, "layer.2.weight", "head.weight"]),
        (["--by", "nonfinite", "--top", 1], [bad]),
        (["--match", "head.*"], ["head.weight"]),
        (["--match", "re:layer[.][45].*"], ["layer.5.weight", "layer.4.weight"]),
    ):
        status, text = piped(capsys, "inspect", "ck", "--moments", *more)
        assert (status, names(text)) == (1, expected)
    document = json.loads(piped(capsys, "inspect", "ck", "--moments", "--top", 1, "--json")[1])
    assert len(document["statistics"]) == 7


@pytest.mark.parametrize("command", [["inspect", "ck"], ["diff", "ck", "ck"]])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("--top 3", "error: --top without --moments: add --moments"),
        ("--moments --top 0", "error: --top 0: expected a number of at least 1"),
        ("--moments --match re:(", "error: --match re:(: "),
        ("--moments --match layer", "error: --match layer: expected the name of a tensor, found 7"),
    ],
)
def test_what_chooses_nothing_is_one_error(
    command: list[str], given: str, expected: str, tensors: Path, capsys: Any
) -> None:
    assert main([*command, *given.split()]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(expected)
    assert told.err.count("\n") == 1


def test_values_that_groups_share_are_printed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkpoint(tmp_path / "one", lr=2.123456e-3)
    _, text = on_terminal(monkeypatch, "inspect", root, NO_COLOR="1")
    assert len(text.splitlines()) <= 24
    shown = " ".join(text.split())
    assert "2 param_groups, all with: is_expert_parallel False," in shown
    assert shown.count("lr 0.002123,") == 1
    assert re.search(r"^  group  wd_mult\n  0      0\n  1      1$", text, re.MULTILINE)


def test_a_diff_begins_with_the_largest_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_both: list[dict[str, Any]] = [
        {"lr": 1e-3, "seed": 10, "x": 0, "style": "a", "near": 0.1, "same": 1, "gone": 3},
        {"lr": 9e-4, "seed": 40, "x": 2, "style": "b", "near": 0.1000001, "same": 1, "new": "v"},
    ]
    scales = ({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.5, "b": -4.0, "c": 1.0})
    for name, args, factors in zip(("one", "two"), of_both, scales, strict=True):
        tensors = {f"optimizer.state.exp_avg.{k}": torch.full((4,), v) for k, v in factors.items()}
        common = {"args": argparse.Namespace(**args)}
        inspected.store(tmp_path / name, tensors, common=common)
    monkeypatch.chdir(tmp_path)
    status, text = piped(capsys, "diff", "one", "two", "--moments")
    assert status == 1
    (section,) = re.findall(r"^args\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    rows = [line.split() for line in section.splitlines()[1:]]
    assert rows == [
        ["x", "0", "2", "from", "0"],
        ["seed", "10", "40", "+300%"],
        ["lr", "0.001", "0.0009", "-10%"],
        ["near", "0.1", "0.1000001", "+0.0001%"],
        ["style", "a", "b"],
    ]
    assert "args, only in a: gone\n" in text
    assert "args, only in b: new\n" in text
    assert "exp_avg: 2 of 3 tensors differ, 8 of 12 elements\n" in text
    found = re.findall(r"^  ([abc]) +4 +4 +(\S+) +(\S+)$", text, re.MULTILINE)
    assert found == [("b", "10", "5"), ("a", "1", "0.5")]
