"""The report: log lines in Megatron's style, JSON, and the JSON's schema."""

from __future__ import annotations

import copy
import json
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from megatron_ext.base.log import say
from megatron_ext.checkpoint.state import SavedOptimizer
from megatron_ext.host.optimizers import TABLE, OptimizerState
from megatron_ext.plan.decisions import Circumstances, Decision
from megatron_ext.plan.hyperparameters import plan_resume
from megatron_ext.policy.counters import Counters
from megatron_ext.policy.document import from_dict, to_dict
from megatron_ext.policy.match import GroupRule, Match, MomentRule
from megatron_ext.policy.phase import Mark, Phase, decide
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import Preset
from megatron_ext.report import files as report_files
from megatron_ext.report.loaded import LoadedState
from megatron_ext.report.model import MomentReport, OptimizerReport, RuleReport
from megatron_ext.report.resume_report import ResumeReport
from megatron_ext.rules.bias_consistent import BiasConsistent
from megatron_ext.rules.elementwise import Scale
from megatron_ext.rules.fill_from import FillFrom
from megatron_ext.rules.prune import PruneRandom
from megatron_ext.version import __version__
from tests.support.groups import group
from tests.support.reports import (
    CURRENT,
    SAVED,
    optimizer_report,
    resume_report,
    scheduler_section,
)

SCHEMA = json.loads(files("megatron_ext").joinpath("schemas/resume-report.schema.json").read_text())
FILES = ["resume-report.json", "resume-report.txt"]


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def validate(document: Any) -> None:
    """Raise unless a document, once through JSON, follows the schema."""
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(json.dumps(document)))


# --- lines


def test_the_lines_tell_the_whole_resume() -> None:
    lines = ResumeReport("0.19.2", [optimizer_report()]).lines()
    assert lines == [
        "megatron_ext: resume of optimizer 0 of 1 (SelectiveAdam over FusedAdam)",
        " > exp_avg: loaded from checkpoint (4 shards, 640 elements on all ranks)",
        " > exp_avg_sq: loaded from checkpoint (4 shards, 640 elements on all ranks)",
        " > master weights: loaded from checkpoint (4 shards, 640 elements on all ranks)",
        " > master weights: 640 of 640 elements are proven to be the model's weights",
        " > step: 100 (checkpoint)",
        " > param_group 0 (3 parameters on rank 0; saved group 0: same group)",
        " >   max_lr: using argument value 0.001 (checkpoint 0.003, argument 0.001; default)",
        " >   eps: using checkpoint value 1e-08 (checkpoint 1e-08, argument 1e-06; "
        "--selective-keep-hyperparameters eps)",
        " >   unchanged: is_expert_parallel, default_config, wd_mult, lr_mult, is_decoupled_lr, "
        "min_lr, bias_correction, betas, weight_decay, foreach",
        " >   only in the checkpoint, not used: amsgrad",
        " > param_group 1 (4 parameters on rank 0; saved group none: the checkpoint has no such "
        "group (added since))",
        " >   is_expert_parallel: using argument value True (checkpoint none, argument True; "
        "default)",
        " >   default_config: using argument value True (checkpoint none, argument True; default)",
        " >   wd_mult: using argument value 1 (checkpoint none, argument 1; default)",
        " >   lr_mult: using argument value 1 (checkpoint none, argument 1; default)",
        " >   is_decoupled_lr: using argument value False (checkpoint none, argument False; "
        "default)",
        " >   max_lr: using argument value 0.001 (checkpoint none, argument 0.001; default)",
        " >   min_lr: using argument value 0.0003 (checkpoint none, argument 0.0003; default)",
        " >   bias_correction: using argument value True (checkpoint none, argument True; default)",
        " >   betas: using argument value (0.9, 0.95) (checkpoint none, argument (0.9, 0.95); "
        "default)",
        " >   eps: using argument value 1e-06 (checkpoint none, argument 1e-06; "
        "--selective-keep-hyperparameters eps, but the checkpoint has no such group (added since))",
        " >   weight_decay: using argument value 0.1 (checkpoint none, argument 0.1; default)",
        " > saved param_group 1 corresponds to no current one: not used",
        " > saved param_group 2 corresponds to no current one: not used",
    ]


def test_every_optimizer_of_a_chain_has_its_title() -> None:
    titles = [line for line in resume_report().lines() if not line.startswith(" >")]
    assert titles == [
        "megatron_ext: resume of optimizer 0 of 2 (SelectiveAdam over FusedAdam)",
        "megatron_ext: resume of optimizer 1 of 2 (SelectiveAdam over FusedAdam)",
    ]


def test_the_first_step_is_told_once_the_scheduler_is_loaded() -> None:
    report = resume_report()
    assert report.scheduler_lines() == []
    report.scheduler = scheduler_section()
    assert report.scheduler_lines() == [
        " > first resumed step, optimizer 0 group 0: learning rate 9.500000E-04, weight decay 0.1",
        " > first resumed step, optimizer 0 group 1: learning rate 9.500000E-05, weight decay 0",
    ]


def test_say_prints_one_line_or_several(capsys: pytest.CaptureFixture[str]) -> None:
    say("one")
    say(["two", "three"])
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


# --- JSON


def test_the_json_holds_the_decisions() -> None:
    report = optimizer_report()
    found = ResumeReport("0.19.2", [report]).to_json()
    assert found["schema"] == "megatron_ext/resume-report/1"
    assert found["megatron_ext"] == __version__
    assert found["megatron_core"] == "0.19.2"
    assert found["policy"] == {"hyperparameters": {"keep": ["eps"]}}
    assert found["scheduler"] is None
    (optimizer,) = found["optimizers"]
    assert optimizer["kind"] == "SelectiveAdam over FusedAdam"
    assert optimizer["plan_digest"] == report.plan.digest()
    assert optimizer["step"] == {"value": 100, "checkpoint": 100, "taken": "checkpoint"}
    assert (optimizer["moments"], optimizer["clip_grad"], optimizer["warnings"]) == (None, None, [])
    assert optimizer["loaded"]["elements"] == {"param": 640, "exp_avg": 640, "exp_avg_sq": 640}
    assert optimizer["unused_saved_groups"] == [1, 2]
    first, added = optimizer["groups"]
    assert (first["index"], first["saved_index"], first["parameters_on_rank_0"]) == (0, 0, 3)
    assert (added["index"], added["saved_index"], added["parameters_on_rank_0"]) == (1, None, 4)
    assert first["dropped_keys"] == ["amsgrad"]
    assert first["keys"]["eps"] == {
        "checkpoint": 1e-8,
        "argument": 1e-6,
        "value": 1e-8,
        "taken": "checkpoint",
        "changed": False,
        "reason": "--selective-keep-hyperparameters eps",
    }
    assert first["keys"]["max_lr"] == {
        "checkpoint": 3e-3,
        "argument": 1e-3,
        "value": 1e-3,
        "taken": "arguments",
        "changed": True,
        "reason": "default",
    }
    assert first["keys"]["betas"]["value"] == [0.9, 0.95]


def test_without_optimizers_there_is_no_policy() -> None:
    found = ResumeReport("0.19.2").to_json()
    assert (found["policy"], found["optimizers"]) == (None, [])
    validate(found)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, None),
        (True, True),
        (7, 7),
        ((0.9, (1, 2)), [0.9, [1, 2]]),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
        (float("nan"), "nan"),
        (torch.tensor(0.5), 0.5),
        (torch.tensor(float("inf")), "inf"),
        (torch.bfloat16, "torch.bfloat16"),
        ({"a": 1}, "{'a': 1}"),
    ],
)
def test_any_value_is_written_as_json(value: Any, written: Any, tmp_path: Path) -> None:
    report = ResumeReport("0.19.2", [optimizer_report(current=(group(custom=value),))])
    read = json.loads(report_files.write(report, tmp_path)[0].read_text())
    custom = read["optimizers"][0]["groups"][0]["keys"]["custom"]
    assert custom["value"] == custom["argument"] == written
    assert type(custom["value"]) is type(written)
    validate(read)


def test_write_makes_the_directory_and_replaces_an_earlier_report(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    report = resume_report()
    path = report_files.write(report, directory)[0]
    assert path == directory / "resume-report.json"
    assert json.loads(path.read_text())["scheduler"] is None
    report.scheduler = scheduler_section()
    report_files.write(report, directory)
    assert json.loads(path.read_text())["scheduler"]["num_steps"] == 32
    assert sorted(p.name for p in directory.iterdir()) == FILES
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_report_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path) -> None:
    report = resume_report()
    report_files.write(report, tmp_path)
    before = contents(tmp_path)
    assert sorted(before) == FILES
    report.scheduler = {"num_steps": float("nan")}
    with pytest.raises(ValueError, match="not JSON compliant"):
        report_files.write(report, tmp_path)
    assert contents(tmp_path) == before


# --- schema


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema"]["const"] == "megatron_ext/resume-report/1"


def test_every_field_is_described_and_no_object_is_open() -> None:
    def walk(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(node, dict):
            yield path, node
            for key, value in node.items():
                yield from walk(value, f"{path}/{key}")

    fields = {
        f"{path}/properties/{name}": field
        for path, node in walk(SCHEMA, "")
        for name, field in node.get("properties", {}).items()
    }
    assert len(fields) > 40
    assert [path for path, field in fields.items() if not field.get("description")] == []
    objects = {path: node for path, node in walk(SCHEMA, "") if node.get("type") == "object"}
    assert all("additionalProperties" in node for node in objects.values())
    # A policy is written as in a policy file: what has its default is left out.
    written_in_full = {
        path: node
        for path, node in objects.items()
        if not path.startswith(("/$defs/policy", "/$defs/match"))
    }
    assert len(written_in_full) > 10
    for node in written_in_full.values():
        assert sorted(node.get("required", [])) == sorted(node.get("properties", {}))


def test_the_policys_part_is_the_schema_of_a_policy_file() -> None:
    text = files("megatron_ext").joinpath("schemas/resume-policy.schema.json").read_text()
    of_a_file = json.loads(text)
    part = SCHEMA["$defs"]["policy"]
    for key in ("type", "additionalProperties", "properties"):
        assert part[key] == of_a_file[key]
    assert of_a_file["$defs"].items() <= SCHEMA["$defs"].items()
    assert "required" not in {**part, **of_a_file}


POLICIES = [
    ResumePolicy(),
    ResumePolicy(("betas", "bias_correction")),
    ResumePolicy(schedule="checkpoint"),
    ResumePolicy(("weight_decay", "max_lr"), "checkpoint"),
    ResumePolicy(preset=Preset("reset"), step=7),
    ResumePolicy(preset=Preset("gradient-scale", (2.0,)), nonfinite="keep"),
    ResumePolicy(preset=Preset("batch-size", (256, 1024), ("eps",)), step="reset", strict=False),
    ResumePolicy(
        hyperparameters="checkpoint",
        take_hyperparameters=("max_lr",),
        groups=(GroupRule({"lr_mult": 0.1}, ("eps",), ("betas",)),),  # type: ignore[arg-type]
        rules=(
            MomentRule(Match("*.bias", (3, None)), Scale(0.5), FillFrom("column-mean")),
            MomentRule(Match("re:a b", None, 2), PruneRandom(0.5, 7), BiasConsistent()),
        ),
    ),
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("step", [None, 100])
def test_reports_of_real_plans_follow_the_schema(policy: ResumePolicy, step: int | None) -> None:
    current = (group(eps=1e-6, lr_mult=0.1), group(wd_mult=0.0, end_wd=None))
    report = ResumeReport("0.19.2", [optimizer_report(policy, step, current)])
    validate(report.to_json())
    report.scheduler = scheduler_section(policy)
    validate(report.to_json())
    written = json.loads(json.dumps(report.to_json()["policy"]))
    assert from_dict(written) == policy
    assert written.get("schedule", "args") == policy.schedule


MOMENTS = MomentReport(
    rules=(
        RuleReport("rule '*.bias'", "reset", "fill 0.5", 16, ("a.bias", "b.bias")),
        RuleReport("preset keep", "keep", "keep", 624),
    ),
    rms={"exp_avg": (0.25, 0.125), "exp_avg_sq": (float("inf"), 0.5)},
    changed={"exp_avg": 12, "exp_avg_sq": 16},
    nonfinite={"exp_avg": 0, "exp_avg_sq": 3},
    warnings=("1 of 2 rules match no parameter",),
)


def changed_report() -> OptimizerReport:
    """Step, gradient clipping and moments of the checkpoint do not go on as they were."""
    policy = ResumePolicy(preset=Preset("gradient-scale", (2.0,)), step=7)
    plan = plan_resume(policy, SavedOptimizer(SAVED, 100), CURRENT, Circumstances(clip_grad=1.0))
    return replace(
        optimizer_report(), plan=plan, moments=MOMENTS, notes=("3 elements were not finite",)
    )


def test_moments_that_were_not_read_have_no_norm_before() -> None:
    moments = replace(
        MOMENTS,
        rms={"exp_avg": (None, 0.0), "exp_avg_sq": (0.25, 0.5)},
        unread={"exp_avg": 640, "exp_avg_sq": 16},
        unread_shards={"exp_avg": 4, "exp_avg_sq": 1},
    )
    report = ResumeReport("0.19.2", [replace(changed_report(), moments=moments)])
    found = report.to_json()
    validate(found)
    state = found["optimizers"][0]["moments"]["state"]
    assert (state["exp_avg"]["rms_before"], state["exp_avg"]["unread"]) == (None, 640)
    assert (state["exp_avg_sq"]["rms_before"], state["exp_avg_sq"]["unread"]) == (0.25, 16)
    loaded = found["optimizers"][0]["loaded"]
    assert loaded["tensors"] == {"param": 4, "exp_avg": 0, "exp_avg_sq": 3}
    assert loaded["elements"] == {"param": 640, "exp_avg": 0, "exp_avg_sq": 624}
    lines = [line for line in report.lines() if line.startswith(" > exp_avg")]
    assert lines == [
        " > exp_avg: not loaded: 640 elements are overwritten without being read",
        " > exp_avg_sq: loaded from checkpoint (3 shards, 624 elements on all ranks; 16 are "
        "overwritten without being read)",
        " > exp_avg: RMS (not read) -> 0, 12 elements changed, 0 not finite",
        " > exp_avg_sq: RMS 0.25 -> 0.5, 16 elements changed, 3 not finite",
    ]


def test_the_json_holds_what_was_done_to_the_moments() -> None:
    report = changed_report()
    found = ResumeReport("0.19.2", [report]).to_json()
    validate(found)
    (optimizer,) = found["optimizers"]
    assert optimizer["step"] == {"value": 7, "checkpoint": 100, "taken": "policy"}
    assert optimizer["moments"] == {
        "rules": [
            {
                "rule": "rule '*.bias'",
                "exp_avg": "reset",
                "exp_avg_sq": "fill 0.5",
                "elements": 16,
                "examples": ["a.bias", "b.bias"],
            },
            {
                "rule": "preset keep",
                "exp_avg": "keep",
                "exp_avg_sq": "keep",
                "elements": 624,
                "examples": [],
            },
        ],
        "state": {
            "exp_avg": {
                "rms_before": 0.25,
                "rms_after": 0.125,
                "changed": 12,
                "nonfinite": 0,
                "unread": 0,
            },
            "exp_avg_sq": {
                "rms_before": "inf",
                "rms_after": 0.5,
                "changed": 16,
                "nonfinite": 3,
                "unread": 0,
            },
        },
    }
    assert optimizer["clip_grad"] == {
        "checkpoint": None,
        "argument": 1.0,
        "value": 2.0,
        "taken": "preset",
        "changed": True,
        "reason": "preset gradient-scale 2: 1 x 2",
    }
    eps = optimizer["groups"][0]["keys"]["eps"]
    assert (eps["argument"], eps["value"], eps["taken"]) == (1e-6, 2e-6, "preset")
    assert optimizer["warnings"] == [
        "3 elements were not finite",
        *report.plan.warnings,
        "1 of 2 rules match no parameter",
    ]
    assert len(report.plan.warnings) > 0


def test_the_lines_tell_what_was_done_to_the_moments() -> None:
    lines = ResumeReport("0.19.2", [changed_report()]).lines()
    for line in (
        " > rule '*.bias': exp_avg reset, exp_avg_sq fill 0.5 (16 elements on all ranks)",
        " > exp_avg: RMS 0.25 -> 0.125, 12 elements changed, 0 not finite",
        " > exp_avg_sq: RMS inf -> 0.5, 16 elements changed, 3 not finite",
        " > WARNING: 3 elements were not finite",
        " > WARNING: 1 of 2 rules match no parameter",
        " >   clip_grad: changed to 2 (checkpoint none, argument 1; preset gradient-scale 2: "
        "1 x 2)",
        " > step: 7 (checkpoint 100)",
        " >   eps: changed to 2e-06 (checkpoint 1e-08, argument 1e-06; preset gradient-scale 2: "
        "1e-06 x 2)",
    ):
        assert line in lines


def _loaded(row: OptimizerState) -> LoadedState:
    keys = LoadedState.of(row).keys
    return LoadedState(dict.fromkeys(keys, 2), dict.fromkeys(keys, 8), keys=keys)


@pytest.mark.parametrize(
    "loaded",
    [
        *map(_loaded, TABLE),
        _loaded(replace(TABLE[2], moments=())),
        _loaded(replace(TABLE[4], moments=TABLE[4].moments[:1], others=("moment2_buffer",))),
        LoadedState(),
    ],
    ids=[*(row.name for row in TABLE), "SGD without momentum", "normuon", "the running optimizer"],
)
def test_a_report_about_other_state_follows_the_schema(loaded: LoadedState) -> None:
    found = ResumeReport("0.19.2", [replace(optimizer_report(), loaded=loaded)]).to_json()
    validate(found)
    assert found["optimizers"][0]["loaded"]["tensors"] == loaded.tensors


# --- phases and counters

NEW_PHASE = ResumePolicy(("eps",), preset=Preset("reset-momentum"), reset_iteration=True, phase="b")
BEFORE = Counters(10, 80, 0, 40, 80)


def phase_report(phase: Phase | None, after: Counters | None = None) -> ResumeReport:
    first, *others = resume_report().optimizers
    first = replace(first, plan=replace(first.plan, phase=phase))
    counters = None if after is None else (BEFORE, after)
    return ResumeReport("0.19.2", [first, *others], counters=counters)


def test_a_transition_is_told_first_and_its_counters_with_their_reasons() -> None:
    phase = decide(NEW_PHASE, None, "phase1@10#00")
    report = phase_report(phase, replace(BEFORE, iteration=0, num_steps=0))
    assert report.lines()[:4] == [
        "megatron_ext: TRANSITION APPLIED (phase b): starts from phase1@10#00: preset "
        "reset-momentum, iteration reset, schedule restart",
        " > iteration: 0 (checkpoint 10; --reset-iteration)",
        " > consumed samples: 80 (checkpoint)",
        " > schedule position (num_steps, in samples): 0 (checkpoint 80; --reset-iteration)",
    ]
    found = report.to_json()
    validate(found)
    assert found["phase"] == {
        "state": "applied",
        "why": phase.why,
        "name": "b",
        "from": "phase1@10#00",
        "checkpoint": "phase1@10#00",
        "operations": ["preset reset-momentum", "iteration reset", "schedule restart"],
        "digest": phase.mark.operations if phase.mark else "",
    }
    assert found["counters"]["iteration"] == {"checkpoint": 10, "value": 0}
    assert found["counters"]["consumed_valid_samples"] == {"checkpoint": 40, "value": 40}
    assert found["policy"] == to_dict(NEW_PHASE)


def test_a_restart_is_told_first_with_what_was_asked_and_what_it_goes_on_with() -> None:
    begun = decide(NEW_PHASE, None, "phase1@10#00").at(80)
    phase = decide(NEW_PHASE, Mark.parse(str(begun.mark)), "phase2@12#11", "own")
    report = phase_report(phase, BEFORE)
    first, *counters = report.lines()[:4]
    start = "megatron_ext: CONTINUED (phase b): the checkpoint belongs to this phase"
    assert first.startswith(start)
    assert "started from phase1@10#00" in first
    assert all(line.endswith("(checkpoint)") for line in counters)
    found = report.to_json()
    validate(found)
    assert found["phase"]["state"] == "continued"
    assert found["phase"]["from"] == "phase1@10#00"
    assert found["phase"]["checkpoint"] == "phase2@12#11"
    assert found["policy"] == to_dict(NEW_PHASE)


def test_a_resume_without_a_phase_says_nothing_about_it() -> None:
    phase = decide(ResumePolicy(), None, "phase1@10#00")
    report = phase_report(phase)
    assert report.lines() == phase_report(None).lines()
    validate(report.to_json())
    found = report.to_json()["phase"]
    assert (found["state"], found["name"], found["from"], found["operations"]) == (
        *("none", None, None),
        [],
    )
    assert phase_report(None).to_json()["phase"] is None


def test_a_run_without_a_scheduler_has_no_position() -> None:
    bare = replace(BEFORE, num_steps=None)
    report = ResumeReport("0.19.2", [optimizer_report()], counters=(bare, bare))
    assert not any("num_steps" in line for line in report.lines())
    validate(report.to_json())


@pytest.mark.parametrize(
    ("choice", "line"),
    [
        ("keep", " > loss scale: 1024 (checkpoint)"),
        ("reset", " > loss scale: 65536 (checkpoint 1024)"),
    ],
)
def test_the_loss_scale_is_told_where_there_is_a_dynamic_one(choice: Any, line: str) -> None:
    scale = 1024.0 if choice == "keep" else 65536.0
    report = replace(optimizer_report(ResumePolicy(grad_scaler=choice)), loss_scale=(1024.0, scale))
    run = ResumeReport("0.19.2", [report])
    assert line in run.lines()
    validate(run.to_json())
    assert not any("loss scale" in x for x in ResumeReport("0", [optimizer_report()]).lines())


def full_report() -> dict[str, Any]:
    phase = decide(NEW_PHASE, None, "phase1@10#00")
    report = phase_report(phase, replace(BEFORE, iteration=0, num_steps=0))
    report.optimizers.append(changed_report())
    report.scheduler = scheduler_section()
    report.environment = {"python": "3.12.0", "torch": "2.15.0", "ranks": 2, "time": "2026-01-01"}
    return json.loads(json.dumps(report.to_json()))


def _optimizer(d: dict[str, Any]) -> dict[str, Any]:
    return d["optimizers"][0]


def _moments(d: dict[str, Any]) -> dict[str, Any]:
    return d["optimizers"][2]["moments"]


def _eps(d: dict[str, Any]) -> dict[str, Any]:
    return _optimizer(d)["groups"][0]["keys"]["eps"]


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another-format": lambda d: d.update(schema="megatron_ext/resume-report/2"),
    "no-version": lambda d: d.pop("megatron_ext"),
    "a-field-too-many": lambda d: d.update(extra=1),
    "no-scheduler": lambda d: d.pop("scheduler"),
    "unknown-schedule": lambda d: d["policy"].update(schedule="stock"),
    "policy-key-twice": lambda d: d["policy"]["hyperparameters"].update(keep=["eps", "eps"]),
    "policy-with-a-field-too-many": lambda d: d["policy"].update(keep_hyperparameters=["eps"]),
    "unknown-preset": lambda d: d["policy"].update(preset="restart"),
    "unknown-operation": lambda d: d["policy"].update(moments=[{"match": "*", "exp_avg": "zero"}]),
    "short-digest": lambda d: _optimizer(d).update(plan_digest="abc"),
    "step-from-arguments": lambda d: _optimizer(d)["step"].update(taken="arguments"),
    "step-without-the-checkpoints": lambda d: _optimizer(d)["step"].pop("checkpoint"),
    "no-moments": lambda d: _optimizer(d).pop("moments"),
    "moments-are-text": lambda d: _optimizer(d).update(moments="kept"),
    "a-rule-without-its-elements": lambda d: _moments(d)["rules"][0].pop("elements"),
    "the-second-moment-alone": lambda d: _moments(d)["state"].pop("exp_avg"),
    "half-an-element-changed": lambda d: _moments(d)["state"]["exp_avg"].update(changed=0.5),
    "no-clipping": lambda d: _optimizer(d).pop("clip_grad"),
    "clipping-without-a-source": lambda d: d["optimizers"][2]["clip_grad"].pop("taken"),
    "one-warning": lambda d: _optimizer(d).update(warnings="look"),
    "step-of-half": lambda d: _optimizer(d)["step"].update(value=0.5),
    "negative-count": lambda d: _optimizer(d)["loaded"]["tensors"].update(exp_avg=-1),
    "no-first-moment": lambda d: _optimizer(d)["loaded"]["elements"].pop("exp_avg"),
    "half-of-another-optimizer": lambda d: _optimizer(d)["loaded"].update(elements={"state": 1}),
    "negative-group": lambda d: _optimizer(d)["groups"][0].update(saved_index=-1),
    "no-note": lambda d: _optimizer(d)["groups"][0].pop("note"),
    "step-among-the-keys": lambda d: _optimizer(d)["groups"][0]["keys"].update(step=_eps(d)),
    "taken-from-nowhere": lambda d: _eps(d).update(taken="default"),
    "changed-is-text": lambda d: _eps(d).update(changed="yes"),
    "value-is-an-object": lambda d: _eps(d).update(value={}),
    "value-holds-an-object": lambda d: _eps(d).update(value=[1, {}]),
    "no-reason": lambda d: _eps(d).pop("reason"),
    "position-of-half": lambda d: d["scheduler"].update(num_steps=0.5),
    "scheduler-value-bare": lambda d: d["scheduler"]["values"].update(max_lr=1e-3),
    "no-phase": lambda d: d.pop("phase"),
    "unknown-state": lambda d: d["phase"].update(state="begun"),
    "phase-without-its-operations": lambda d: d["phase"].pop("operations"),
    "phase-with-a-field-too-many": lambda d: d["phase"].update(offset=0),
    "operations-are-text": lambda d: d["phase"].update(operations="preset reset"),
    "no-counters": lambda d: d.pop("counters"),
    "a-counter-bare": lambda d: d["counters"].update(iteration=10),
    "a-counter-missing": lambda d: d["counters"].pop("num_steps"),
    "a-counter-of-half": lambda d: d["counters"]["iteration"].update(value=0.5),
    "no-length": lambda d: d["scheduler"].pop("train_iters"),
    "one-batch-size": lambda d: d["scheduler"].update(global_batch_size=8),
    "no-environment": lambda d: d.pop("environment"),
    "an-environment-without-a-time": lambda d: d["environment"].pop("time"),
    "a-rule-without-examples": lambda d: _moments(d)["rules"][0].pop("examples"),
    "no-checkpoint": lambda d: d["phase"].pop("checkpoint"),
    "first-step-without-lr": lambda d: d["scheduler"]["first_step"][0].pop("lr"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_report_is_rejected(name: str) -> None:
    document = full_report()
    validate(document)
    wrong = copy.deepcopy(document)
    WRONG[name](wrong)
    assert wrong != document
    with pytest.raises(jsonschema.ValidationError):
        validate(wrong)


def test_a_report_shows_a_value_its_plan_would_write() -> None:
    report = optimizer_report()
    group_plan = report.plan.groups[0]
    changed = Decision("eps", 1e-8, 1e-6, "arguments", "default")
    others = tuple(d for d in group_plan.decisions if d.key != "eps")
    plan = replace(report.plan, groups=(replace(group_plan, decisions=(*others, changed)),))
    found = ResumeReport("0", [replace(report, plan=plan, parameters=(3,))]).to_json()
    assert found["optimizers"][0]["groups"][0]["keys"]["eps"]["value"] == 1e-6
    assert plan.groups[0].values["eps"] == 1e-6


def test_the_report_of_a_transition_outlives_restarts(tmp_path: Path) -> None:
    begun = decide(NEW_PHASE, None, "phase1@10#00")
    after = replace(BEFORE, iteration=0, num_steps=0)
    report_files.write(phase_report(begun, after), tmp_path)
    transition = {p.suffix: p.read_text() for p in tmp_path.glob("transition-report-10.*")}
    latest = {p.suffix: p.read_text() for p in tmp_path.glob("resume-report.*")}
    assert transition == latest
    again = decide(NEW_PHASE, begun.mark, "phase2@14#00")
    report_files.write(phase_report(again, BEFORE), tmp_path)
    states = {f.name: json.loads(f.read_text())["phase"]["state"] for f in tmp_path.glob("*.json")}
    assert states == {"resume-report.json": "continued", "transition-report-10.json": "applied"}
    assert {p.suffix: p.read_text() for p in tmp_path.glob("transition-report-10.*")} == transition
    assert "CONTINUED" in (tmp_path / "resume-report.txt").read_text()
