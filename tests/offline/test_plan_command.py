"""``python -m megatron_ext plan``: what it says beforehand is what a resume does."""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from megatron_ext.checkpoint import store
from megatron_ext.checkpoint.stored import open_checkpoint
from megatron_ext.cli import main
from megatron_ext.errors import CheckpointError, PlanError
from megatron_ext.host.schedule import ScheduleValues, values_of
from megatron_ext.offline.command_line import locate, parse
from megatron_ext.offline.current_groups import current_groups
from megatron_ext.offline.forecast import forecast
from megatron_ext.offline.forecast_model import Forecast
from megatron_ext.offline.inspection import inspect_checkpoint
from megatron_ext.offline.pasted import script_arguments
from megatron_ext.offline.plan_document import document
from megatron_ext.offline.planned_arguments import complete
from megatron_ext.offline.stored_parameters import Named, Stored, in_groups, parameters_of
from megatron_ext.policy.phase import Mark, digest_of
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import Preset
from megatron_ext.report.loaded import LoadedState
from megatron_ext.report.model import OptimizerReport
from megatron_ext.report.resume_report import ResumeReport
from tests.checkpoint.test_stored import Evil, bend
from tests.conftest import FIRST, STEPS, Checkpoints
from tests.support import inspected
from tests.support.checkpoints import checkpoint, checksums
from tests.support.groups import group
from tests.support.harness import Hyper, Layout
from tests.support.planned import words
from tests.support.pool import RankPool
from tests.support.runs import needs_training

EMBEDDING = "embedding.word_embeddings.weight"

SCHEMA = json.loads(files("megatron_ext").joinpath("schemas/resume-plan.schema.json").read_text())

BF16 = Layout()
FULL = replace(BF16, format="fully_reshardable")
LEGACY = replace(BF16, format="torch")
MOE = Layout(experts=4, ep=2)

SECOND = Hyper(
    lr=1e-3,
    min_lr=1e-4,
    weight_decay=0.05,
    betas=(0.8, 0.9),
    eps=1e-6,
    train_iters=60,
    warmup_iters=3,
)
#: All harness models are of local modules, which their checkpoints do not say.
LOCAL = {"transformer_impl": "local"}
#: What a legacy checkpoint leaves open, as it names no parameters.
UNKNOWN = "the current param_groups are not known: the checkpoint does not name its parameters"


def plan(
    capsys: pytest.CaptureFixture[str], *arguments: Any, valid: bool = True
) -> tuple[int, dict[str, Any]]:
    """Exit status and document of ``plan --json``."""
    capsys.readouterr()
    status = main(["plan", *map(str, arguments), "--json"])
    found = json.loads(capsys.readouterr().out)
    if valid:
        jsonschema.Draft202012Validator(SCHEMA).validate(found)
    return status, found


def printed(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str]:
    """Exit status and what it prints where stdout is no terminal."""
    capsys.readouterr()
    status = main(["plan", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema"]["const"] == "megatron_ext/resume-plan/1"


# --- on real checkpoints, against the report of the resume

POLICIES = {
    "hyperparameters": """
        hyperparameters:
          keep: [eps, weight_decay]
          groups: [{match: {wd_mult: 0}, keep: [betas]}]
    """,
    "moments": """
        preset: {name: gradient-scale, s: 0.5}
        moments:
          - {match: 'output_layer.weight[40:]', exp_avg: reset, exp_avg_sq: fill column-mean}
          - {match: 'decoder.layers.1.*.linear_fc2.weight[3:9] wd_mult=1', exp_avg: scale 0.25}
          - {match: '*layernorm* ndim=1', exp_avg_sq: floor 1e-6}
          - match: embedding.position_embeddings.weight
            exp_avg: fill mean-of *.linear_proj.weight
            exp_avg_sq: fill mean-of re:decoder[.].*linear_proj[.].*
    """,
    "reset": "{preset: reset, schedule: checkpoint}",
}
REAL = {
    "dp_reshardable": BF16,
    "fully_reshardable": FULL,
    "torch": LEGACY,
    "moe": MOE,
    "moe-fully_reshardable": replace(MOE, format="fully_reshardable"),
    "replicated": replace(BF16, distributed=False),
    "tp2": replace(FULL, tp=2),
}


@pytest.mark.ranks
@pytest.mark.parametrize("name", REAL)
def test_the_plan_is_the_report_of_the_resume(
    name: str,
    checkpoints: Checkpoints,
    ext: RankPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = REAL[name]
    directory, _ = checkpoints.phase_1(layout, 2)
    done = ext.run(
        "tests.support.policies:resumed",
        2,
        layout=layout,
        hyper=SECOND,
        directory=directory,
        policies=POLICIES,
    )[0]
    saved = {**LOCAL, "expert_model_parallel_size": layout.ep}
    monkeypatch.setattr("megatron_ext.offline.forecast.open_checkpoint", with_arguments(saved))
    for policy, text in POLICIES.items():
        file = tmp_path / f"{policy}.yaml"
        file.write_text(text)
        said = document(forecast(directory, [*words(SECOND), "--selective-policy", str(file)]))
        report = done[policy]["report"]
        assert said["errors"] == []
        assert said["policy"] == report["policy"]
        assert len(said["optimizers"]) == len(report["optimizers"])
        for ours, theirs in zip(said["optimizers"], report["optimizers"], strict=True):
            for key in ("step", "clip_grad", "unused_saved_groups"):
                assert ours[key] == theirs[key]
            for one, other in zip(ours["groups"], theirs["groups"], strict=True):
                assert one == {k: v for k, v in other.items() if k != "parameters_on_rank_0"}
            assert set(theirs["warnings"]) <= set(said["warnings"])
            unknown = [w for w in said["warnings"] if w.startswith(UNKNOWN)]
            assert len(unknown) == (layout.format == "torch")
            if layout.format == "torch":
                assert ours["rules"] is None or policy == "hyperparameters"
            elif layout.tp == 1 and layout.distributed:
                # Of what every rank has a copy of, the report counts all copies.
                rules = [{k: r[k] for k in theirs_of(r)} for r in ours["rules"]]
                done_rules = (theirs["moments"] or {"rules": []})["rules"]
                assert rules == [{k: r[k] for k in theirs_of(r)} for r in done_rules]
        # The ranks' scheduler is not built from arguments, whose default is a form of WSD.
        for section in (said["scheduler"], report["scheduler"]):
            del section["values"]["lr_wsd_decay_style"]
        for key in ("values", "num_steps", "first_step"):
            assert said["scheduler"][key] == report["scheduler"][key]
    names = {n: next(iter(s.values())).shape for n, s in done["reset"]["state"].items()}
    found = parameters_of(with_arguments(LOCAL)(directory))
    if layout.format == "torch":
        assert found.by is None
    else:
        assert {p.name: p.shape for p in found.parameters} == names
        by_bucket = layout.distributed and layout.format == "dp_reshardable"
        assert found.by == ("model" if by_bucket else "optimizer")


def theirs_of(rule: dict[str, Any]) -> list[str]:
    """What a plan and a report say of a rule in the same words."""
    return [k for k in rule if k not in ("parameters", "examples")]


def with_arguments(more: dict[str, Any]) -> Callable[..., Any]:
    """`open_checkpoint` of checkpoints that say more of their run."""

    def opened(*args: Any) -> Any:
        found = open_checkpoint(*args)
        return replace(found, args={**found.args, **more})

    return opened


@pytest.mark.ranks
@pytest.mark.matrix
@pytest.mark.parametrize(
    ("before", "after"),
    [(True, True), (False, True), pytest.param(True, False, marks=needs_training)],
)
def test_groups_with_a_learning_rate_of_their_own(
    before: bool,
    after: bool,
    checkpoints: Checkpoints,
    ext: RankPool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = replace(FIRST, **(OLD_RATES if before else {}))
    second = replace(SECOND, start_wd=0.01, end_wd=0.2, wd_incr_style="cosine")
    if after:
        second = replace(second, decoupled_lr=2e-3, decoupled_min_lr=2e-4)
    directory, _ = checkpoints.phase_1(BF16, 2, first)
    done = ext.run(
        "tests.support.subject:resume", 2, layout=BF16, hyper=second, directory=directory, more=1
    )[0]
    saved = OLD_RATES if before else {}
    monkeypatch.setattr("megatron_ext.offline.forecast.open_checkpoint", with_arguments(saved))
    given = words(second)
    if before and not after:
        # A missing flag has the checkpoint's value, but not on the command line of a whole run.
        # Megatron's own parser reads that.
        given += ["--num-layers", "2", "--micro-batch-size", "2", "--hidden-size", "16"]
        given += ["--num-attention-heads", "4"]
    found = forecast(directory, given)
    said = document(found)
    (theirs,) = done["report"]["optimizers"]
    assert [g["keys"] for g in said["optimizers"][0]["groups"]] == [
        g["keys"] for g in theirs["groups"]
    ]
    rates = {1e-3, 2e-3} if after else {1e-3}
    assert {g["keys"]["max_lr"]["value"] for g in theirs["groups"]} == rates
    assert [lr for _, lr, _ in found.first_step] == done["lrs"][0]
    assert [wd for _, _, wd in found.first_step] == done["wds"][0]
    assert not [n for n in found.notes if "does not follow from" in n]
    assert not [w for w in found.all_warnings if "not known" in w]


#: Of embedding and output layer.
OLD_RATES = {"decoupled_lr": 6e-3, "decoupled_min_lr": 6e-4}


def test_groups_that_megatron_does_not_make_are_not_known(tmp_path: Path) -> None:
    """Of a script with groups of its own, and where the optimizer is a chain with others."""
    tensors = {"optimizer.state.exp_avg.a.weight": torch.ones(2, 2)}
    for groups, changes, why in (
        ([group()], {}, ""),
        ([group(wd_mult=0.5)], {}, "are not those that Megatron makes"),
        ([group(), group(max_lr=1e-2, default_config=False)], {}, "are not those that Megatron"),
        ([group()], {"optimizer": "muon"}, "--optimizer muon makes a chain"),
        ([group()], {"use_mup": True}, "--use-mup needs the hidden size"),
        ([group()], {"lr": None}, "have a learning rate"),
    ):
        state = {"optimizer": {"param_groups": groups}}
        common = {"args": Namespace(**changes), "optimizer": state}
        common["opt_param_scheduler"] = {"num_steps": 0, "max_lr": changes.get("lr", 1e-3)}
        where = tmp_path / str(len(list(tmp_path.iterdir())))
        found = forecast(inspected.store(where, tensors, common=common))
        unknown = [w for w in found.all_warnings if "param_groups are not known" in w]
        assert len(unknown) == bool(why)
        assert all(why in w and "--selective-dry-run" in w for w in unknown)


@pytest.mark.parametrize(
    ("changes", "scheduler", "told"),
    [
        ({}, {"num_steps": float("inf")}, "num_steps is inf; expected a whole number"),
        ({"consumed_train_samples": "many"}, {"num_steps": 0}, "consumed_train_samples is 'many'"),
    ],
)
def test_a_damaged_counter_is_one_error(
    changes: dict[str, object], scheduler: dict[str, float], told: str, tmp_path: Path
) -> None:
    common = {
        "args": Namespace(**changes),
        "optimizer": {"optimizer": {"param_groups": [group()]}},
        "opt_param_scheduler": {"max_lr": 1e-3, **scheduler},
    }
    tensors = {"optimizer.state.exp_avg.a.weight": torch.ones(2, 2)}
    with pytest.raises(CheckpointError, match=re.escape(told)):
        forecast(inspected.store(tmp_path / "one", tensors, common=common))


# --- arguments


def test_only_what_changes_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "min_lr": 3e-4, "adam_eps": 1e-8})
    before = checksums(root)
    status, found = plan(capsys, root, "--lr", "1e-3", "--json", "--train-iters", "40")
    assert (status, [w.startswith(UNKNOWN) for w in found["warnings"]]) == (1, [True])
    assert found["outcome"] == "resume"
    assert not found["arguments"]["complete"]
    assumed = {a["flag"]: (a["value"], a["source"]) for a in found["arguments"]["assumed"]}
    assert assumed["--min-lr"] == (3e-4, "the checkpoint's arguments")
    assert assumed["--lr-decay-iters"] == (40, "the checkpoint's arguments")
    assert assumed["--adam-beta2"] == (0.95, "its optimizer")
    assert not {"--lr", "--train-iters", "--load", "--override-opt_param-scheduler"} & set(assumed)
    keys = found["optimizers"][0]["groups"][0]["keys"]
    assert (keys["max_lr"]["value"], keys["min_lr"]["value"]) == (1e-3, 3e-4)
    assert found["curves"][-1]["iterations"][-1] == 40
    _, text = printed(capsys, root, "--lr", "1e-3", "--full")
    (line,) = re.findall(r"assumed, from the checkpoint's arguments: (.*)", text)
    pasted = parse(shlex.split(line)).values
    given = {a["flag"]: a["value"] for a in found["arguments"]["assumed"]}
    assert "--min-lr 0.0003 " in line
    for name in ("min_lr", "lr_decay_iters", "global_batch_size", "use_distributed_optimizer"):
        assert getattr(pasted, name) == given[f"--{name.replace('_', '-')}"], name
    assert checksums(root) == before


def test_a_length_that_nobody_gave_does_not_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "min_lr": 3e-4, "train_iters": 10})
    status, found = plan(capsys, root, "--selective-preset", "reset")
    assert (status, found["outcome"], found["errors"]) == (1, "transition", [])
    assert any(n.startswith("--train-iters 10 comes from the checkpoint") for n in found["notes"])
    status, found = plan(capsys, root, "--selective-preset", "reset", "--train-iters", 10)
    assert (status, found["outcome"]) == (2, "refused")
    assert "nothing left to train" in found["errors"][0]


@pytest.mark.parametrize(
    ("saved", "given", "expected"),
    [
        ({"train_iters": 20}, "--train-samples 800", {"train_iters": None, "train_samples": 800}),
        ({"train_iters": 20, "train_samples": 160}, "", {"train_iters": None}),
        (
            {"lr_warmup_iters": 5},
            "--lr-warmup-fraction 0.1",
            {"lr_warmup_iters": 0, "lr_warmup_fraction": 0.1},
        ),
        ({"lr_warmup_fraction": 0.1}, "--lr-warmup-iters 3", {"lr_warmup_fraction": None}),
        ({"finetune": True, "no_load_optim": True, "load": "/x"}, "", {"finetune": None}),
        ({"weight_decay": 0.1}, "", {"weight_decay": 0.1, "clip_grad": 1.0}),
    ],
)
def test_alternatives_and_what_a_run_is_told(
    saved: dict[str, Any], given: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, **saved})
    line = parse(given.split())
    found = complete(line, locate(line, root), open_checkpoint(root)).values
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.load == str(root)


def test_without_saved_arguments_the_optimizer_tells(tmp_path: Path) -> None:
    root = checkpoint(tmp_path / "one", args=False)
    state_of = root / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    state = torch.load(state_of, weights_only=False)
    state["opt_param_scheduler"] |= {
        "min_lr": 1e-5,
        "lr_warmup_steps": 16,
        "lr_decay_steps": 320,
        "lr_decay_style": "cosine",
        "start_wd": 0.1,
        "end_wd": 0.1,
        "wd_incr_steps": 160,
        "wd_incr_style": "constant",
    }
    torch.save(state, state_of)
    line = parse([])
    values = values_of(complete(line, locate(line, root), open_checkpoint(root)).values)
    assert values == ScheduleValues(
        max_lr=3e-4,
        min_lr=1e-5,
        lr_decay_steps=320,
        lr_warmup_steps=16,
        lr_decay_style="cosine",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=160,
        lr_wsd_decay_style="exponential",
    )


def test_what_cannot_be_known_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = checkpoint(tmp_path / "one", args=False)
    status, found = plan(capsys, root, "--selective-preset", "reset")
    assert (status, found["outcome"]) == (1, "transition")
    assert found["curves"] == []
    assert any("Give --lr, --train-iters" in n for n in found["notes"])
    assert found["warnings"][0].startswith(UNKNOWN)
    # A rate that nobody knows is no missing flag.
    root = checkpoint(tmp_path / "two", args=False, scheduler={"max_lr": None})
    _, found = plan(capsys, root)
    assert found["errors"] == []


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            {"train_iters": 100, "global_batch_size": 4, "lr_decay_iters": None},
            {"lr_decay_steps": 400, "lr_warmup_steps": 20, "wd_incr_steps": 400},
        ),
        (
            {"train_iters": 100, "lr_warmup_fraction": 0.1, "lr_wsd_decay_iters": 10},
            {"lr_decay_steps": 640, "lr_warmup_steps": 64.0, "wsd_decay_steps": 80},
        ),
        (
            {"train_iters": None, "train_samples": 900, "lr_warmup_samples": 30},
            {"lr_decay_steps": 900, "lr_warmup_steps": 30, "wd_incr_steps": 900},
        ),
        ({"weight_decay_incr_style": "linear"}, {"start_wd": 0.01, "end_wd": 0.2}),
        ({}, {"start_wd": 0.1, "end_wd": 0.1}),
    ],
)
def test_the_schedulers_values_follow_from_the_arguments(
    args: dict[str, Any], expected: dict[str, Any]
) -> None:
    """As training/training.py:1906 and training/arguments.py:1353 have it."""
    given = {
        "lr": 1e-3,
        "min_lr": 0.0,
        "train_iters": 100,
        "train_samples": None,
        "global_batch_size": 8,
        "lr_decay_iters": 80,
        "lr_decay_samples": None,
        "lr_warmup_iters": 5,
        "lr_warmup_samples": 0,
        "lr_warmup_fraction": None,
        "lr_warmup_init": 0.0,
        "lr_decay_style": "linear",
        "lr_wsd_decay_style": "exponential",
        "weight_decay": 0.1,
        "start_weight_decay": 0.01,
        "end_weight_decay": 0.2,
        "weight_decay_incr_style": "constant",
    }
    found = values_of(Namespace(**{**given, **args}))
    assert {name: getattr(found, name) for name in expected} == expected
    with pytest.raises(PlanError, match="Give --lr, --train-iters"):
        values_of(Namespace(**{**given, "train_iters": None}))


def test_bounds_that_no_argument_gives_are_kept_and_said() -> None:
    saved = [[group(max_lr=3e-3), group(max_lr=7e-3, default_config=False)]]
    before = Namespace(lr=3e-3, min_lr=3e-4, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-8)
    now = Namespace(lr=1e-3, min_lr=1e-4, adam_beta1=0.9, adam_beta2=0.99, adam_eps=1e-6)
    found = current_groups(saved, Stored((), None), before, now)
    assert found.unknown == "the checkpoint does not name its parameters"
    ((one, other),) = found.optimizers
    assert (one["max_lr"], other["max_lr"]) == (1e-3, 7e-3)
    assert (one["min_lr"], other["min_lr"], other["betas"]) == (1e-4, 1e-4, (0.9, 0.99))
    (note,) = found.notes
    assert note.startswith("max_lr 0.007 of some param_groups does not follow from an argument")


def test_a_policy_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that a user of the library without megatron.training may have."""
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100})
    file = tmp_path / "policy.yaml"
    file.write_text("{preset: reset-momentum, hyperparameters: {keep: [eps]}}")
    for arguments in ((root, "--policy", file), ("--policy", file, root)):
        _, found = plan(capsys, *arguments)
        assert found["policy"]["preset"] == "reset-momentum"
        keys = found["optimizers"][0]["groups"][1]["keys"]
        assert {k: d["taken"] for k, d in keys.items() if d["taken"] == "checkpoint"} == {
            "eps": "checkpoint"
        }
    status, found = plan(capsys, root, "--policy", file, "--selective-step", "reset")
    assert status == 2
    assert "expected the file or the flags" in found["errors"][0]


# --- phases, directories, refusals

RESET = ResumePolicy(preset=Preset("reset"))


def test_a_phase_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100})
    _, found = plan(capsys, one, "--selective-from", one, "--load", tmp_path / "two", *RESET_WORDS)
    assert found["outcome"] == "transition"
    mark = Mark("", found["phase"]["from"], digest_of(RESET), done=RESET.operations)
    two = checkpoint(tmp_path / "two", 12, mark=mark, changes={"lr": 3e-3, "train_iters": 100})
    directories = ["--selective-from", one, "--load", two, "--save", two]
    status, found = plan(capsys, two, *directories, *RESET_WORDS)
    assert (status, found["outcome"]) == (1, "continued")
    assert [w.startswith(UNKNOWN) for w in found["warnings"]] == [True]
    assert found["optimizers"][0]["step"]["value"] == 12
    # In its own directory other operations are another phase's.
    other = ("--selective-preset", "reset-momentum")
    status, found = plan(capsys, two, *directories, *other)
    assert status == 2
    assert "holds a checkpoint of another phase" in found["errors"][0]
    # The same command line would not load the first phase's checkpoint any more.
    status, found = plan(capsys, one, *directories, *RESET_WORDS)
    assert status == 1
    assert f"a run loads {two}, not {one}" in found["warnings"][0]


RESET_WORDS = ("--selective-preset", "reset")


def test_counters_and_the_curve_begin_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100})
    _, found = plan(capsys, root, "--reset-iteration", "--reset-dataloader")
    told = {k: (v["checkpoint"], v["value"]) for k, v in found["counters"].items()}
    assert told["iteration"] == (10, 0)
    assert told["consumed_train_samples"] == (80, 0)
    assert told["num_steps"] == (80, 0)
    curve = next(c for c in found["curves"] if c["phase"] == 2)
    assert (curve["iterations"][0], curve["samples"][0]) == (0, 0)
    old = found["curves"][0]
    assert (old["iterations"][0], old["iterations"][-1], old["samples"][-1]) == (0, 10, 80)


def test_a_schedule_from_the_checkpoint_needs_what_it_does_not_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {"lr": 3e-3, "train_iters": 100, "lr_wsd_decay_iters": 20, "lr_decay_iters": 60}
    root = checkpoint(tmp_path / "one", scheduler={"lr_decay_style": "WSD"}, changes=saved)
    from_checkpoint = "--use-checkpoint-opt_param-scheduler"
    status, found = plan(capsys, root, from_checkpoint, "--lr-wsd-decay-iters", 5)
    assert (status, found["outcome"]) == (2, "refused")
    assert "--lr-wsd-decay-iters 5" in found["errors"][0]
    assert "20 iters of 8 samples" in found["errors"][0]
    # What is not given is that of the checkpoint's run.
    _, found = plan(capsys, root, from_checkpoint)
    assert found["errors"] == []


def test_arguments_that_the_scheduler_does_not_accept_are_refused_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {"lr": 3e-3, "min_lr": 3e-4, "train_iters": 100, "weight_decay": 0.1}
    # A checkpoint has the arguments as Megatron's validation leaves them.
    saved |= {"start_weight_decay": 0.1, "end_weight_decay": 0.1}
    root = checkpoint(tmp_path / "one", changes=saved)
    status, found = plan(capsys, root, "--lr", "1e-5")
    assert (status, found["outcome"]) == (2, "refused")
    (error,) = found["errors"]
    assert "--lr 1e-05 is below --min-lr 0.0003" in error
    assert not [n for n in found["notes"] if "does not accept" in n]
    _, found = plan(capsys, root, "--weight-decay", 0.05)
    assert found["errors"] == []
    assert not [a for a in found["arguments"]["assumed"] if "t-weight-decay" in a["flag"]]
    _, found = plan(capsys, root, "--start-weight-decay", 0.05)
    assert "--start-weight-decay 0.05 with --weight-decay-incr-style constant" in found["errors"][0]
    # A load does not check that the bounds of two runs fit.
    _, found = plan(capsys, root, "--min-lr", "1e-3", "--selective-keep-hyperparameters", "max_lr")
    assert found["errors"] == []


def test_a_rate_after_the_end_of_the_schedule_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = {"lr": 3e-3, "min_lr": 3e-4, "train_iters": 10, "lr_decay_iters": 10}
    root = checkpoint(tmp_path / "one", changes={**saved, "weight_decay": 0.1}, lr=3e-4)
    longer = ("--train-iters", 20, "--lr-decay-iters", 20)
    status, found = plan(capsys, root, *longer)
    assert status == 1
    (warning,) = (w for w in found["warnings"] if not w.startswith(UNKNOWN))
    # A linear decay, half over.
    assert "the first resumed learning rate is 0.00165, 5.50x the last used one, 0.0003" in warning
    _, found = plan(capsys, root, *longer, "--selective-schedule", "restart")
    assert not any("learning rate" in w for w in found["warnings"])


@pytest.mark.parametrize("more", [[], ["--no-load-optim"]])
def test_an_overridden_iteration_is_where_the_run_goes_on(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100})
    _, found = plan(capsys, root, "--override-ckpt-iteration", "4", *more)
    told = {k: (v["checkpoint"], v["value"]) for k, v in found["counters"].items()}
    assert told["iteration"] == (10, 4)
    assert told["consumed_train_samples"] == (80, 32)
    assert told["num_steps"] == (80, 0 if more else 80)
    curve = next(c for c in found["curves"] if c["phase"] == 2)
    assert curve["iterations"][0] == 4


def test_everything_that_is_wrong_is_said_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3})
    status, found = plan(
        capsys,
        root,
        *("--lr-warmup-iters", 50, "--lr-decay-iters", 40, "--train-iters", 5),
        *("--selective-preset", "reset", "--tensor-model-parallel-size", 2),
    )
    assert (status, found["outcome"]) == (2, "refused")
    text = "\n".join(found["errors"])
    for part in ("--lr-warmup-iters 50", "--tensor-model-parallel-size 1 -> 2", "--train-iters 5"):
        assert text.count(part) == 1, part
    assert len(found["errors"]) == 3
    status, text = printed(capsys, root, "--selective-preset", "rest")
    assert status == 2
    assert text.startswith("REFUSED: the run would stop before its first step; 1 problem\n1. ")
    assert "unknown preset 'rest'" in text


def test_a_rule_that_matches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"optimizer.state.exp_avg.decoder.layers.mlp.w": torch.ones(3, 4, 5)}
    common = {"args": Namespace(lr=1e-3, train_iters=9, global_batch_size=8)}
    directory = inspected.store(tmp_path / "a", tensors, common=common)
    rule = ["--selective-rule", "decoder.layers.3.*", "reset", "reset"]
    status, found = plan(capsys, directory, *rule)
    assert status == 2
    assert "decoder.layers.3.*" in found["errors"][0]
    assert "Names look like decoder.layers.0.mlp.w, decoder.layers.2.mlp.w" in found["errors"][0]
    status, found = plan(capsys, directory, *rule, "--no-selective-strict")
    assert status == 1
    assert "match no parameter" in "\n".join(found["warnings"])
    rule[1] = "decoder.layers.2.*[1:]"
    status, found = plan(capsys, directory, *rule)
    (first, preset) = found["optimizers"][0]["rules"]
    assert (first["parameters"], first["elements"]) == (1, 3 * 5)
    assert first["examples"] == ["decoder.layers.2.mlp.w[1:4]"]
    assert (preset["parameters"], preset["elements"]) == (3, 2 * 20 + 5)


def test_large_objects_show_a_summary_in_a_notebook(tmp_path: Path) -> None:
    tensors = {"optimizer.state.exp_avg.decoder.layers.mlp.w": torch.ones(3, 4, 5)}
    common = {"args": Namespace(lr=1e-3, min_lr=0.0, train_iters=9, global_batch_size=8)}
    directory = inspected.store(tmp_path / "<b>", tensors, common=common)
    found = forecast(directory, ["--lr", "1e-4", "--train-iters", "20"])
    plan, checkpoint = found.optimizers[0].plan, inspect_checkpoint(directory)
    report = ResumeReport("0.19.2", [OptimizerReport("A", plan, LoadedState(), ())])
    for one, shown in (
        (found, ["outcome: resume", "changed: max_lr", "<b>"]),
        (plan, ["changed: max_lr", "step: 5"]),
        (report, ["phase: none", "optimizers: A"]),
        (checkpoint, ["format: torch_dist", "<b>"]),
    ):
        name = type(one).__name__
        assert repr(one).startswith(f"<{name} ")
        assert len(repr(one)) < 600
        page = one._repr_html_()
        assert page.startswith(f"<table><caption>{name}</caption><tr><th>")
        for word in shown:
            assert word in repr(one)
            key, _, value = word.partition(": ")
            assert (f"<th>{key}</th><td>{value}" if value else "&lt;b&gt;") in page


MEAN_OF = ("--selective-rule", "new_norm", "reset")


@pytest.mark.parametrize(
    ("words", "errors"),
    [
        ((*MEAN_OF, "fill mean-of decoder.*", "--selective-new-parameters", "new_norm"), []),
        (
            (*MEAN_OF, "fill mean-of decoder.*"),
            ["1 of 1 rules match no parameter that holds moments"],
        ),
        (
            (*MEAN_OF, "fill mean-of *.v", "--selective-new-parameters", "new_norm"),
            ["fill mean-of *.v for exp_avg_sq matches no parameter that holds moments. Names look"],
        ),
        (("--selective-rule", "final", "reset", "fill mean-of decoder.*"), []),
        (
            ("--selective-rule", "final", "reset", "fill mean-of *"),
            ["found final (this rule sets it itself)"],
        ),
        (
            (
                *("--selective-rule", "final", "reset", "fill mean-of decoder.*"),
                *("--selective-rule", "decoder.layers.1.*", "keep", "floor 1e-9"),
            ),
            ["found decoder.layers.1.mlp.w (changed by another rule)"],
        ),
        (
            (
                *("--selective-rule", "final", "reset", "fill mean-of decoder.*"),
                *("--num-layers", "4", "--selective-new-parameters", "decoder.layers.3.*"),
            ),
            ["found decoder.layers.3.mlp.w (new to the optimizer)"],
        ),
    ],
)
def test_the_parameters_of_a_mean_are_checked(
    words: tuple[str, ...], errors: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = ("", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
    tensors = {k + "decoder.layers.mlp.w": torch.ones(3, 4, 5) for k in kinds}
    tensors |= {f"{k}final": torch.ones(5) for k in kinds}
    args = {"lr": 1e-3, "train_iters": 9, "global_batch_size": 8, "num_layers": 3}
    common = {"args": Namespace(**args)}
    directory = inspected.store(tmp_path / "a", tensors, common=common)
    status, found = plan(capsys, directory, *words)
    assert len(found["errors"]) == len(errors)
    for text, expected in zip(found["errors"], errors, strict=True):
        assert expected in text
    idle = [w for w in found["warnings"] if "match no parameter" in w]
    assert bool(idle) == ("new_norm" in words[-1])
    assert (status == 2) == bool(errors)


@pytest.mark.ranks
def test_a_mean_of_another_optimizers_parameters_is_refused(checkpoints: Checkpoints) -> None:
    layout = replace(MOE, ep=2, format="fully_reshardable")
    directory, _ = checkpoints.phase_1(layout, 2)
    rule = ("decoder.final_layernorm.*", "fill mean-of *linear_fc1.*", "keep")
    found = forecast(directory, [*words(SECOND), "--selective-rule", *rule])
    (error,) = found.errors
    assert "another optimizer of the chain updates decoder.layers.0.mlp.experts" in str(error)


@pytest.mark.parametrize("step", [-5, 2.5, math.inf])
def test_a_step_that_adam_cannot_have_taken_is_refused(
    step: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one", step=step, changes={"lr": 3e-3, "train_iters": 100})
    assert main(["plan", str(root)]) == 2
    assert f"step is {step}; expected a whole number from 0 to" in capsys.readouterr().err


def test_dropped_moments_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100})
    status, found = plan(capsys, root, "--no-load-optim")
    assert (status, found["outcome"]) == (1, "drops")
    assert found["warnings"] == ["--no-load-optim: the checkpoint's Adam moments are dropped"]
    assert found["counters"]["iteration"]["value"] == 10
    assert found["scheduler"]["num_steps"] == 0
    _, text = printed(capsys, root, "--no-load-optim")
    first = found["scheduler"]["first_step"][0]["lr"]
    assert re.search(rf"^  first lr +0\.002 -> {first:.4g} \({first / 2e-3:.3g}x\)$", text, re.M)
    assert re.search(r"^  moments +dropped by --no-load-optim$", text, re.M)
    _, found = plan(capsys, root, "--finetune")
    assert found["counters"]["iteration"]["value"] == 0


def test_a_grown_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        f"optimizer.state.exp_avg.{EMBEDDING}": torch.ones(128, 4),
        "optimizer.state.exp_avg.w": torch.ones(4, 4),
    }
    args = {
        "lr": 1e-3,
        "train_iters": 9,
        "global_batch_size": 8,
        "padded_vocab_size": 128,
        "tokenizer_type": "NullTokenizer",
        "make_vocab_size_divisible_by": 128,
    }
    directory = inspected.store(tmp_path / "a", tensors, common={"args": Namespace(**args)})
    _, found = plan(capsys, directory, "--vocab-size", 300)
    (one,) = found["optimizers"][0]["resized"]
    assert one == {
        "name": "embedding.word_embeddings.weight",
        "saved": 128,
        "now": 384,
        "bare": 256,
    }
    text = "\n".join(found["warnings"])
    assert (
        "--selective-rule 'embedding.word_embeddings.weight[128:]' reset 'fill column-mean'" in text
    )


# --- bad input


@pytest.mark.parametrize("words", ["--lr", "--lr x", "--num-layers", "--num-layers two"])
def test_bad_arguments_are_one_error(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one")
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(root), *words.split()])
    assert caught.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    usage, error = told.err.splitlines()
    assert usage.startswith("usage: python -m megatron_ext plan CKPT")
    assert error.startswith(f"python -m megatron_ext plan: error: argument {words.split()[0]}")


def test_a_scripts_own_arguments_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100})
    status, found = plan(capsys, root, "--my-flag", "3", "--lr", "1e-3", "--min-lrr", "1")
    assert status == 1
    assert found["arguments"]["unknown"] == ["--my-flag", "3", "--min-lrr", "1"]
    (warning,) = (w for w in found["warnings"] if w.startswith("not looked at"))
    assert warning.startswith("not looked at: --my-flag 3 --min-lrr 1. ")
    assert " does not know --my-flag, --min-lrr (did you mean --min-lr?): a mistake, or " in warning


@pytest.mark.parametrize(
    "command",
    [
        "{args}",
        "torchrun --nproc-per-node 8 --nnodes=2 pretrain_gpt.py {args}",
        "A=1 B='x.py y' srun -N 2 -m cyclic /opt/bin/torchrun --standalone a/train.py {args}",
        "python3.12 -u -m torch.distributed.run --nproc-per-node 8 pretrain_gpt.py {args}",
        "torchrun -m megatron_ext.launch --cpu --cpu-adam torch pretrain_gpt.py {args}",
        "python -m torch.distributed.run -m megatron_ext.launch {first} pretrain_gpt.py {rest}",
        "torchrun --nproc-per-node 8 -m my.training {args}",
        "torchrun \\\n  --nproc-per-node 8 \\\n  pretrain_gpt.py \\\n  {args}",
    ],
)
@pytest.mark.parametrize("one_word", [False, True])
def test_a_pasted_command_line_is_its_scripts_arguments(command: str, one_word: bool) -> None:
    first, rest = "--selective-preset scale 0.5 0.25", "--lr 1e-3 --save 'a b'"
    text = command.format(args=f"{first} {rest}", first=first, rest=rest)
    # The shell passes a quoted text on as it is, and joins lines in others.
    given = [text] if one_word else shlex.split(text.replace("\\\n", " "))
    wanted = ["--selective-preset", "scale", "0.5", "0.25", "--lr", "1e-3", "--save", "a b"]
    assert script_arguments(given) == wanted


def test_a_mistyped_flag_of_ours_or_no_script_at_all_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100})
    for line, expected in {
        "--lr 1e-3 --selective-presett reset": (
            "error: unknown flag: --selective-presett (did you mean --selective-preset?). "
        ),
        "--selective-xyz=1": "error: unknown flag: --selective-xyz",
        "bash run.sh --lr 1e-3": "error: bash: expected Megatron's arguments, or the command line",
    }.items():
        assert main(["plan", str(root), *line.split()]) == 2
        told = capsys.readouterr()
        assert told.out == ""
        assert told.err.startswith(expected)
        assert told.err.count("\n") == 1
    status, found = plan(capsys, root, "torchrun", "train.py", "--lr", "1e-3", "--iteration", "10")
    assert (status, found["errors"]) == (1, [])
    assert found["optimizers"][0]["groups"][0]["keys"]["max_lr"]["argument"] == 1e-3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--plot x.pdf", "error: --plot x.pdf: expected a file that ends in .png or .svg"),
        ("--yaml-cfg x.yaml", "error: --yaml-cfg: with it Megatron replaces"),
        ("--iteration 3 --ckpt-step 4", "error: iterations 3 and 4: expected one"),
        ("--iteration 3", "iter_0000003 does not exist"),
    ],
)
def test_what_cannot_be_planned(
    words: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one")
    assert main(["plan", str(root), *words.split()]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert expected in told.err
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1


def foreign(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()
    (directory / "model.safetensors").touch()


FAULTS: dict[str, Callable[[Path], None]] = {
    "truncated .metadata": lambda d: (d / ".metadata").write_bytes(b"\x80"),
    "truncated .distcp": lambda d: (d / "__0_0.distcp").write_bytes(b""),
    "no common.pt": lambda d: (d / "common.pt").unlink(),
    "no directory": shutil.rmtree,
    "foreign": foreign,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_one_clear_error(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = inspected.store(tmp_path / "a", {"optimizer.state.exp_avg.w": torch.ones(2)})
    assert main(["plan", str(directory)]) in (0, 1)
    FAULTS[fault](directory)
    capsys.readouterr()
    assert main(["plan", str(directory), "--json"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1
    assert str(directory) in told.err


@pytest.mark.ranks
@pytest.mark.parametrize("file", ["common.pt", "common_state", ".metadata", "model_optim_rng.pt"])
def test_nothing_in_a_checkpoint_runs(
    file: str, checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "ran"
    layout = LEGACY if file == "model_optim_rng.pt" else FULL
    directory, _ = checkpoints.phase_1(layout, 2)

    def payload(data: bytes) -> bytes:
        if file == ".metadata":
            index = pickle.loads(data)
            index.storage_meta = Evil(marker)
            return pickle.dumps(index)
        path = tmp_path / "payload"
        state = {"iteration": STEPS, "args": Evil(marker)}
        torch.save([state] if file == "common_state" else state, path)
        return path.read_bytes()

    bend(file, directory, tmp_path, payload)
    status = main(["plan", str(tmp_path / "bent"), *words(SECOND), "--selective-preset", "reset"])
    assert status in (0, 1, 2)
    assert not marker.exists()
    told = capsys.readouterr()
    assert told.out or told.err.startswith("error: ")
    # The payload works.
    torch.load(tmp_path / "payload", weights_only=False) if file != ".metadata" else pickle.loads(
        (tmp_path / "bent" / file).read_bytes()
    )
    assert marker.exists()


def test_names_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "[bold]$x$\x1b[31m\n<b>&\u202e"
    tensors = {f"optimizer.state.exp_avg.{name}": torch.ones(2, 2)}
    hostile = group(step=5, **{name: name})
    common = {
        "args": Namespace(lr=1e-3, train_iters=9, global_batch_size=8, lr_decay_style="linear"),
        "optimizer": {
            "optimizer": {"param_groups": [hostile]},
            "param_state_sharding_type": "fully_reshardable",
        },
        "opt_param_scheduler": {"num_steps": 40, "lr_decay_style": name},
    }
    directory = inspected.store(tmp_path / "a", tensors, common=common)
    for picture in ("a.png", "a.svg"):
        plot = ("--plot", tmp_path / picture)
        status, text = printed(capsys, directory, "--selective-preset", "reset", *plot)
        assert status == 1
        assert (tmp_path / picture).stat().st_size > 1000
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "\\x1b[31m" in text
        assert "\\u202e" in text
    _, found = plan(capsys, directory, "--selective-preset", "reset")
    assert name in found["optimizers"][0]["groups"][0]["keys"]


# --- names from an index


@pytest.mark.parametrize(
    ("key", "shape", "args", "expected"),
    [
        (
            "embedding.word_embeddings.weight",
            (8, 2),
            {},
            {"embedding.word_embeddings.weight": (8, 2)},
        ),
        (
            "decoder.layers.self_attention.linear_proj.weight",
            (2, 4, 4),
            {},
            {f"decoder.layers.{i}.self_attention.linear_proj.weight": (4, 4) for i in (0, 1)},
        ),
        (
            "decoder.layers.7.mlp.linear_fc2.bias",
            (4,),
            {},
            {"decoder.layers.7.mlp.linear_fc2.bias": (4,)},
        ),
        (
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
            (1, 4),
            {"transformer_impl": "local"},
            {"decoder.layers.0.input_layernorm.weight": (4,)},
        ),
        (
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
            (1, 4),
            {"transformer_impl": "transformer_engine"},
            {"decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": (4,)},
        ),
        (
            "decoder.layers.mlp.experts.experts.linear_fc2.weight",
            (1, 2, 3, 4),
            {},
            {
                f"decoder.layers.0.mlp.experts.local_experts.{e}.linear_fc2.weight": (3, 4)
                for e in (0, 1)
            },
        ),
        (
            "decoder.layers.5.mlp.experts.experts.linear_fc2.weight",
            (2, 3, 4),
            {"moe_grouped_gemm": True},
            {f"decoder.layers.5.mlp.experts.linear_fc2.weight{e}": (3, 4) for e in (0, 1)},
        ),
        (
            "decoder.layers.5.mlp.experts.experts.9.linear_fc2.weight",
            (3, 4),
            {"moe_grouped_gemm": True},
            {"decoder.layers.5.mlp.experts.linear_fc2.weight9": (3, 4)},
        ),
        ("decoder.layers.weird", (), {}, {"decoder.layers.weird": ()}),
    ],
)
def test_names_of_parameters(
    key: str,
    shape: tuple[int, ...],
    args: dict[str, Any],
    expected: dict[str, tuple[int, ...]],
    tmp_path: Path,
) -> None:
    tensors = {f"optimizer.state.exp_avg.{key}": torch.ones(shape)}
    directory = inspected.store(tmp_path / "a", tensors, common={"args": Namespace(**args)})
    found = parameters_of(open_checkpoint(directory))
    assert {p.name: p.shape for p in found.parameters} == expected


def test_two_halves_of_a_gated_layer_are_one_parameter(tmp_path: Path) -> None:
    key = "decoder.layers.0.mlp.linear_fc1.weight"
    tensors = {f"{key}_w": torch.ones(3, 4), f"{key}_v": torch.ones(3, 4), "x_w": torch.ones(2)}
    found = parameters_of(open_checkpoint(inspected.store(tmp_path / "a", tensors)))
    assert found.by == "model"
    assert set(found.parameters) == {Named(key, (6, 4)), Named("x_w", (2,))}


def test_parameters_are_in_the_groups_that_megatron_makes() -> None:
    dense = [group(wd_mult=0.0), group(), group(max_lr=9e-3, default_config=False)]
    expert = [group(is_expert_parallel=True)]
    names = {
        "embedding.word_embeddings.weight": ((8, 4), (0, 2)),
        "decoder.final_layernorm.weight": ((4,), (0, 0)),
        "decoder.layers.0.mlp.linear_fc1.weight": ((4, 4), (0, 1)),
        "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight": ((4, 4), (1, 0)),
        "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.bias": ((4,), (1, 0)),
        "decoder.layers.0.mlp.shared_experts.linear_fc1.weight": ((4, 4), (0, 1)),
    }
    parameters = [Named(name, shape) for name, (shape, _) in names.items()]
    found = in_groups(parameters, [dense, expert], rows=(8, 16), decoupled=True)
    placed = {p.name: (n, p.group) for n, of_one in enumerate(found) for p in of_one}
    assert placed == {name: place for name, (_, place) in names.items()}
    (grown,) = [p for p in found[0] if p.saved_rows is not None]
    assert (grown.shape, grown.saved_rows) == ((16, 4), 8)


# --- what it is like


def test_stdout_has_the_document_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100})

    def talking(*args: Any) -> Forecast:
        # As Megatron does where a library that it imports has set up logging.
        handler = logging.StreamHandler(sys.stdout)
        logger = logging.getLogger("megatron.core.optimizer")
        logger.addHandler(handler)
        logger.warning("INFO: Setting up optimizer with config")
        logger.removeHandler(handler)
        print("> learning rate decay style: linear")
        return forecast(*args)

    monkeypatch.setattr("megatron_ext.offline.forecast.forecast", talking)
    main(["plan", str(root), "--lr", "1e-3", "--json"])
    told = capsys.readouterr()
    assert json.loads(told.out)["schema"].startswith("megatron_ext/resume-plan/")
    for line in ("INFO: Setting up optimizer with config", "> learning rate decay style: linear"):
        assert line in told.err.splitlines()


def test_a_plot_without_matplotlib_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", str(tmp_path), "--plot", str(tmp_path / "curves.svg")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: --plot needs the package matplotlib, which cannot be imported:")
    assert error.endswith("Install it with pip install 'megatron_ext[report]'")


def test_the_command_imports_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys, megatron_ext.cli.plan; print([m for m in "
        "('torch', 'rich', 'megatron', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_tracker_is_not_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One iteration's own directory, and one that --iteration or --ckpt-step names."""
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100})
    checkpoint(root, 20, changes={"lr": 3e-3, "train_iters": 100})
    (root / store.TRACKER).write_text("20")
    for arguments in (
        [root, "--iteration", 10],
        [root, "--ckpt-step", 10],
        ["--iteration", 10, root],
        [root / "iter_0000010"],
    ):
        _, found = plan(capsys, *arguments, *RESET_WORDS)
        assert found["checkpoint"]["iteration"] == 10
        # By the name that a run gives it, which loads it from `root`.
        assert found["phase"]["from"].startswith(f"{tmp_path.name}/one@10#")
    _, found = plan(capsys, root)
    assert found["checkpoint"]["iteration"] == 20


def test_points_of_every_curve_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = checkpoint(tmp_path / "one", changes={"lr": 3e-3, "train_iters": 100})
    _, text = printed(capsys, root, "--full")
    found = re.findall(r"^  (\D+?) +0 +1  \w+ +(\d+) +\d+ +([\d.]+) ", text, re.MULTILINE)
    lr = {0: 3e-3, 5: 2.6625e-3, 10: 2.325e-3, 55: 3e-4, 100: 3e-4}
    assert [(curve, int(i)) for curve, i, _ in found] == [
        *(("checkpoint's run", i) for i in (0, 5, 10)),
        *(("resumed run", i) for i in (10, 55, 100)),
    ]
    assert all(value == f"{lr[int(i)]:.4g}" for _, i, value in found)
