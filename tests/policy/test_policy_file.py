"""Policies as YAML: the same object as from flags and from Python, and the JSON schema."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.errors import PolicyError
from megatron_ext.policy import flags
from megatron_ext.policy.document import from_dict, to_dict
from megatron_ext.policy.from_flags import request_from_args
from megatron_ext.policy.match import GroupRule, Match, MomentRule
from megatron_ext.policy.parameter_map import Copy, ParameterMap
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import CATALOGUE, Preset
from megatron_ext.policy.yaml_file import dumps, loads, read
from megatron_ext.rules.batch_size import BatchRatio
from megatron_ext.rules.elementwise import Fill, Scale
from megatron_ext.rules.fill_from import FillFrom
from megatron_ext.rules.mean_of import MeanOf
from megatron_ext.rules.prune import PruneRandom
from tests.support.groups import KEEPABLE
from tests.support.policy_strategies import POLICIES

SCHEMA = json.loads(files("megatron_ext").joinpath("schemas/resume-policy.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def refusal(text: str) -> str:
    with pytest.raises(PolicyError) as caught:
        loads(text)
    return str(caught.value)


# --- one policy, three ways

RICH = ResumePolicy(
    keep_hyperparameters=("eps", "betas"),
    take_hyperparameters=("max_lr",),
    hyperparameters="checkpoint",
    groups=(
        GroupRule((("is_expert_parallel", True), ("wd_mult", 1e-3)), ("min_lr",), ("eps",)),
        GroupRule((("lr_mult", 0.1),), (), ("betas",)),
    ),
    preset=Preset("batch-size", (256, 1024), ("lr", "eps")),
    rules=(
        MomentRule(Match("output_layer.weight", (32000, None)), Fill(0.0), FillFrom("column-mean")),
        MomentRule(
            Match("re:decoder[.]layers[.]1[.].*", ndim=2, group=(("is_expert_parallel", False),)),
            Scale(-0.5),
            Scale(0.25),
        ),
        MomentRule(Match("*.bias"), PruneRandom(0.5, 7), PruneRandom(0.5, 7)),
        MomentRule(Match("embedding.*", (None, 8)), exp_avg_sq=BatchRatio(1e-3)),
        MomentRule(Match("*.q_norm.*"), MeanOf("*.k_norm.*"), MeanOf("re:.*[.](k|v)_norm[.].*")),
    ),
    step=1000,
    nonfinite="reset",
    master_weights="model",
    parameters=ParameterMap(
        ("mtp.*", "output_layer.weight"),
        ("*_layernorm.weight",),
        (
            Copy("decoder.layers.{n}.*", "decoder.layers.{n-2}.*"),
            Copy(r"re:a\.(?P<b>.*)", "c.{b}", "weights"),
        ),
    ),
    strict=False,
    schedule_position="continue",
    grad_scaler="reset",
    reset_iteration=True,
    reset_dataloader=True,
    phase="long-context_2.1",
)

FLAGS = [
    *"--selective-keep-hyperparameters eps betas".split(),
    *"--selective-take-hyperparameters max_lr".split(),
    *"--selective-hyperparameters checkpoint".split(),
    *"--selective-group-rule is_expert_parallel=true wd_mult=1e-3 keep min_lr take eps".split(),
    *"--selective-group-rule lr_mult=0.1 take betas".split(),
    *"--selective-preset batch-size 256 1024 --selective-decline lr eps".split(),
    *["--selective-rule", "output_layer.weight[32000:]", "reset", "fill column-mean"],
    *["--selective-rule", "re:decoder[.]layers[.]1[.].* ndim=2 is_expert_parallel=false"],
    *["scale -0.5", "scale 0.25"],
    *["--selective-rule", "*.bias", "prune-random 0.5 seed 7", "prune-random 0.5 seed 7"],
    *["--selective-rule", "embedding.*[:8]", "keep", "batch-size 1e-3"],
    *["--selective-rule", "*.q_norm.*", "fill mean-of *.k_norm.*"],
    "fill mean-of re:.*[.](k|v)_norm[.].*",
    *"--selective-step 1000 --selective-nonfinite reset --no-selective-strict".split(),
    *"--selective-master-weights model".split(),
    *"--selective-schedule continue --selective-grad-scaler reset".split(),
    *"--reset-iteration --reset-dataloader --selective-phase long-context_2.1".split(),
    *"--selective-new-parameters mtp.* output_layer.weight".split(),
    *"--selective-drop-parameters *_layernorm.weight".split(),
    *"--selective-copy-parameters decoder.layers.{n}.* decoder.layers.{n-2}.*".split(),
    *r"--selective-copy-parameters re:a\.(?P<b>.*) c.{b} weights".split(),
]

YAML = """
hyperparameters:
  source: checkpoint
  keep: [eps, betas]
  take: [max_lr]
  groups:
    - match: {wd_mult: 1e-3, is_expert_parallel: true}
      keep: [min_lr]
      take: [eps]
    - match: {lr_mult: 0.1}
      take: [betas]
preset: {name: batch-size, old: 256, new: 1024, decline: [lr, eps]}
moments:
  - match: "output_layer.weight[32000:]"
    exp_avg: reset
    exp_avg_sq: fill column-mean
  - match: {name: "re:decoder[.]layers[.]1[.].*", ndim: 2, group: {is_expert_parallel: false}}
    exp_avg: scale -0.5
    exp_avg_sq: scale 0.25
  - match: "*.bias"
    exp_avg: prune-random 0.5 seed 7
    exp_avg_sq: prune-random 0.5 seed 7
  - match: {name: embedding.*, rows: ":8"}
    exp_avg_sq: batch-size 1e-3
  - match: "*.q_norm.*"
    exp_avg: fill mean-of *.k_norm.*
    exp_avg_sq: fill mean-of re:.*[.](k|v)_norm[.].*
step: 1000
nonfinite: reset
master_weights: model
parameters:
  new: ["mtp.*", output_layer.weight]
  drop: ["*_layernorm.weight"]
  copies:
    - to: decoder.layers.{n}.*
      from: decoder.layers.{n-2}.*
    - to: re:a\\.(?P<b>.*)
      from: c.{b}
      state: weights
strict: false
counters: {iteration: reset, dataloader: reset, schedule: continue, grad_scaler: reset}
phase: long-context_2.1
"""


def from_flags(argv: list[str]) -> ResumePolicy:
    parser = flags.add_flags(argparse.ArgumentParser(allow_abbrev=False))
    return request_from_args(parser.parse_args(argv)).policy


def test_flags_yaml_and_python_give_the_same_policy() -> None:
    assert loads(YAML) == RICH
    assert from_flags(FLAGS) == RICH
    assert hash(loads(YAML)) == hash(from_flags(FLAGS)) == hash(RICH)


def test_the_second_names_of_flags_say_the_same() -> None:
    for one, other in [
        (
            "--selective-preset batch-sqrt 1 4 --selective-decline lr",
            "--selective-preset batch-sqrt 1 4 --selective-preset-exclude lr",
        ),
        (
            "--selective-hyperparameters checkpoint --selective-take-hyperparameters eps",
            "--selective-hyperparameters checkpoint --selective-override eps",
        ),
        ("--selective-schedule restart", "--selective-reset-schedule"),
    ]:
        assert from_flags(one.split()) == from_flags(other.split()) != ResumePolicy()


def test_a_file_says_what_the_flags_say(tmp_path: Path) -> None:
    path = tmp_path / "phase2.yaml"
    path.write_text(YAML)
    assert read(path) == RICH
    assert from_flags(["--selective-policy", str(path)]) == RICH


def test_the_example_of_the_docs_is_a_policy() -> None:
    text = Path(__file__).parents[2].joinpath("docs", "what-a-resume-does.md").read_text()
    (example,) = re.findall(r"```yaml\n(# phase2\.yaml.*?)```", text, re.DOTALL)
    assert loads(example).rules != ()
    VALIDATOR.validate(yaml.safe_load(example))


@given(policy=POLICIES)
def test_what_is_written_is_read_back_as_the_same_policy(policy: ResumePolicy) -> None:
    assert loads(dumps(policy)) == policy
    assert dumps(loads(dumps(policy))) == dumps(policy)
    assert from_dict(json.loads(json.dumps(to_dict(policy)))) == policy


def test_defaults_are_left_out() -> None:
    assert dumps(ResumePolicy()) == "{}\n"
    assert to_dict(ResumePolicy(("eps",))) == {"hyperparameters": {"keep": ["eps"]}}
    assert to_dict(ResumePolicy(preset=Preset("reset"))) == {"preset": "reset"}
    assert to_dict(ResumePolicy(preset=Preset("relora", (0.9,)))) == {
        "preset": {"name": "relora", "p": 0.9}
    }
    assert to_dict(ResumePolicy(schedule_position="continue")) == {
        "counters": {"schedule": "continue"}
    }
    assert to_dict(ResumePolicy(reset_iteration=True, phase="b")) == {
        "counters": {"iteration": "reset"},
        "phase": "b",
    }
    everything = to_dict(RICH)
    assert sorted(everything) == sorted(set(SCHEMA["properties"]) - {"schedule"})


@pytest.mark.parametrize("text", ["", "{}", "# nothing\n", "---\n", "preset: keep"])
def test_a_file_that_says_nothing_is_the_default(text: str) -> None:
    assert loads(text) == ResumePolicy()


@pytest.mark.parametrize("text", ["gradient-scale 1e-3", "{name: gradient-scale, s: 1e-3}"])
def test_yamls_number_that_is_a_text_is_a_number(text: str) -> None:
    # YAML 1.1 wants a point: PyYAML reads 1e-3 as a text.
    assert loads(f"preset: {text}").preset == Preset("gradient-scale", (0.001,))


@pytest.mark.parametrize(
    "match",
    [
        Match("two words"),
        Match("w[0:3]"),
        Match("w[0:3]", (4, 5)),
        Match("w", group=(("ndim", 2),)),
        Match("w", (3, None), 2, (("a b", "c d"),)),
    ],
)
def test_a_match_whose_text_would_mean_another_is_written_as_a_mapping(match: Match) -> None:
    policy = ResumePolicy(rules=(MomentRule(match),))
    assert isinstance(to_dict(policy)["moments"][0]["match"], dict) is (match.rows != (4, 5))
    assert loads(dumps(policy)) == policy


# --- bad input


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing.yaml"
    with pytest.raises(PolicyError, match=re.escape(f"--selective-policy {path}: cannot be read")):
        read(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\xff", b"preset: [", b"presett: reset"])
def test_every_error_names_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "phase2.yaml"
    path.write_bytes(content)
    with pytest.raises(PolicyError, match=re.escape(f"--selective-policy {path}: ")):
        read(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("presett: reset", "policy: unknown key 'presett'; did you mean 'preset'? Known: "),
        ("warmup: 3", "policy: unknown key 'warmup'; Known: hyperparameters, schedule, preset"),
        ("1: 2", "policy: expected names as keys, found 1"),
        ("reset", "policy: expected a mapping, found 'reset'"),
        ("[]", "policy: expected a mapping, found []"),
        ("preset: [", "not YAML: while parsing"),
        ("moments: [{match: *.bias}]", "Text that begins with * or ends with : needs quotes"),
        ("step: 2020-13-45", "not YAML: month must be in 1..12"),
        ("preset: reset\nstep: 3\npreset: keep", "line 3: 'preset' is given twice"),
        ("moments: [{match: w, exp_avg: keep, exp_avg: reset}]", "'exp_avg' is given twice"),
        ("hyperparameters: {keep: [eps, eps]}", "hyperparameters.keep: 'eps' is given twice"),
        ("step:", "policy: step: expected a value, found nothing"),
        ("hyperparameters:", "policy: hyperparameters: expected a value, found nothing"),
        ("hyperparameters: [eps]", "hyperparameters: expected a mapping, found ['eps']"),
        (
            "hyperparameters: {kept: [eps]}",
            "did you mean 'keep'? Known: source, keep, take, groups",
        ),
        ("hyperparameters: {keep: eps}", "hyperparameters.keep: expected a list, found 'eps'"),
        ("hyperparameters: {keep: [1]}", "hyperparameters.keep: expected names, found 1"),
        ("hyperparameters: {keep: [lr]}", "'lr' cannot be kept"),
        ("hyperparameters: {source: both}", "hyperparameters: expected 'args' or 'checkpoint'"),
        ("hyperparameters: {groups: {}}", "hyperparameters.groups: expected a list, found {}"),
        (
            "hyperparameters: {groups: [{mach: {a: 1}}]}",
            "hyperparameters.groups[0]: unknown key 'mach'; did you mean 'match'?",
        ),
        (
            "hyperparameters: {groups: [{match: [a], keep: [eps]}]}",
            "hyperparameters.groups[0].match: expected a mapping, found ['a']",
        ),
        (
            "hyperparameters: {groups: [{match: {a: 2020-01-01}, keep: [eps]}]}",
            "a: expected a plain value, found datetime.date(2020, 1, 1)",
        ),
        ("schedule: stock", "schedule: expected 'args' or 'checkpoint', found 'stock'"),
        ("preset: rest", "unknown preset 'rest'; did you mean 'reset'?"),
        ("preset: ''", "unknown preset ''; Presets: keep"),
        ("preset: 3", "preset: expected a name, or a mapping with 'name', found 3"),
        ("preset: {old: 1}", "preset: expected a name, or a mapping with 'name'"),
        ("preset: {name: rest}", "unknown preset 'rest'; did you mean 'reset'?"),
        ("preset: {name: [reset]}", "unknown preset ['reset']"),
        ("preset: {name: gradient-scale, S: 2}", "preset gradient-scale: unknown key 'S'; "),
        ("preset: {name: gradient-scale}", "expected 'gradient-scale S'"),
        ("preset: {name: gradient-scale, s: two}", "expected 'gradient-scale S'"),
        ("preset: {name: gradient-scale, s: true}", "expected 'gradient-scale S'"),
        ("preset: {name: gradient-scale, s: .inf}", "expected 'gradient-scale S'"),
        ("preset: {name: reset, decline: [lr]}", "preset reset: unknown key 'decline'"),
        (
            "preset: {name: batch-size, old: 1, new: 4, decline: lr}",
            "preset.decline: expected a li",
        ),
        ("preset: {name: batch-size, old: 1, new: 4, decline: [LR]}", "'LR' cannot be declined"),
        ("moments: {match: w}", "moments: expected a list, found {'match': 'w'}"),
        ("moments: [w]", "moments[0]: expected a mapping, found 'w'"),
        ("moments: [{exp_avg: reset}]", "moments[0]: expected 'match', found only 'exp_avg'"),
        ("moments: [{match: w, exp_avg_sqr: reset}]", "did you mean 'exp_avg_sq'?"),
        (
            "moments: [{match: w}, {match: w, exp_avg: scal 2}]",
            "moments[1]: unknown operation 'scal 2'; did you mean 'scale'?",
        ),
        ("moments: [{match: w, exp_avg: 0}]", "moments[0]: unknown operation 0; Operations"),
        ("moments: [{match: w, exp_avg_sq: scale -1}]", "moments[0]: rule w: 'scale -1.0' would"),
        ("moments: [{match: 3}]", "moments[0].match: expected a text or a mapping, found 3"),
        ("moments: [{match: ''}]", "moments[0]: match '': expected a parameter name"),
        ("moments: [{match: 're:('}]", "moments[0]: match 're:(': not a regular expression"),
        (
            "moments: [{match: {nme: w}}]",
            "moments[0].match: unknown key 'nme'; did you mean 'name'",
        ),
        ("moments: [{match: {rows: 130}}]", "expected a text in quotes such as '32000:'"),
        ("moments: [{match: {rows: '3:4][5:6'}}]", "moments[0].match.rows: expected a text in"),
        ("moments: [{match: {rows: '5:3'}}]", "rows 5:3 are empty"),
        ("moments: [{match: {ndim: true}}]", "ndim is True"),
        ("moments: [{match: {name: w, group: [a]}}]", "moments[0].match.group: expected a mapping"),
        ("step: 1e3", "--selective-step: expected keep, reset or a number"),
        ("step: -1", "--selective-step: expected keep, reset or a number of at least 0, found -1"),
        ("nonfinite: ignore", "nonfinite: expected 'error' or 'reset' or 'keep', found 'ignore'"),
        ("strict: 'no'", "strict: expected true or false, found 'no'"),
        ("counters: reset", "counters: expected a mapping, found 'reset'"),
        (
            "counters: {itertion: reset}",
            "counters: unknown key 'itertion'; did you mean 'iteration'? Known: iteration, "
            "dataloader, schedule, grad_scaler",
        ),
        ("counters: {iteration: }", "counters: iteration: expected a value, found nothing"),
        ("counters: {iteration: true}", "counters.iteration: expected keep or reset, found True"),
        ("counters: {dataloader: 0}", "counters.dataloader: expected keep or reset, found 0"),
        ("counters: {schedule: keep}", "counters.schedule: expected continue or restart, found"),
        ("counters: {schedule: [restart]}", "expected continue or restart, found ['restart']"),
        ("counters: {grad_scaler: 65536}", "counters.grad_scaler: expected keep or reset, found"),
        ("phase: 2", "phase: expected a text, found 2; write '2' in quotes"),
        ("phase: second phase", "expected letters, digits, '.', '_' and '-', found 'second phase'"),
        ("phase: [b]", "phase: expected a text, found ['b']"),
    ],
)
def test_what_no_policy_has_is_refused_with_the_place_and_what_was_expected(
    text: str, message: str
) -> None:
    assert message in refusal(text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("phase: x\n\npresett: reset", 3),
        ("preset: reset\nmoments:\n- match: a\n- match: b\n  exp_avgg: reset", 5),
        ("preset: reset\nmoments:\n- match: a\n  exp_avg: reset\n- match: b\n  exp_avg: rset", 6),
        ("hyperparameters:\n  keep:\n  - betas\n  - lr", 4),
        ("step: 1\npreset: {name: batch-size, old: 1, new: x}", 2),
        ("strict: true\ncounters:\n  iteration: rest", 3),
        # Neither a place nor a word of the file.
        ("phase: x\nstep: -4", None),
    ],
)
def test_a_refusal_names_the_line(text: str, line: int | None) -> None:
    found = re.match(r"line (\d+): ", refusal(text))
    assert (found and int(found[1])) == line


#: The most characters of a policy file.
SIZE = 1 << 18
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1},' * 9}]\n" for n in range(1, 40))
RULE = "- match: w\n  exp_avg: reset\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 1: the anchor &a0 is not read in a policy; write the value itself"),
        ("a: 1\nb: *c", "line 2: the alias *c is not read in a policy; write the value"),
        ("a: 1\n<<: {b: 2}", "line 2: the merge key << is not read in a policy; write the keys"),
        ('step: !!int ""', "line 1: the tag tag:yaml.org,2002:int is not read in a policy"),
        ("a: !!python/name:os.system", "the tag tag:yaml.org,2002:python/name:os.system is not"),
        ("step: 0100", "line 1: the number 0100 is not read in a policy; write 100, or quotes"),
        ("step: -007", "the number -007 is not read in a policy; write -7, or quotes around it"),
        ("step: 1:30", "the number 1:30 is not read in a policy; write it as a decimal number, or"),
        ("step: 1_000", "the number 1_000 is not read in a policy; write 1000, or quotes"),
        ("step: 0x1F", "the number 0x1F is not read in a policy; write 31, or quotes"),
        ("step: 0o17", "the number 0o17 is not read in a policy; write 15, or quotes"),
        ("step: 0b11", "the number 0b11 is not read in a policy; write 3, or quotes"),
        ("preset: {name: gradient-scale, s: 00.5}", "the number 00.5 is not read in a policy; wr"),
        ("preset: {name: gradient-scale, s: 1_0e-3}", "the number 1_0e-3 is not read in a policy"),
        ("preset: {name: relora, p: 1:30.5}", "the number 1:30.5 is not read in a policy; write"),
        (f"step: {'9' * 5000}", "line 1: expected a number of at most 64 characters, found one of"),
        ("step: " + "[" * 100_000, "line 1: expected at most 16 levels, found more"),
        ("- " * 100_000, "line 1: expected at most 16 levels, found more"),
        ("a: [" + "1," * 30_000 + "]", "line 1: expected at most 20000 values, found more"),
        ("".join(f"k{n}: 1\n" for n in range(15_000)), "line 10000: expected at most 20000"),
        ("#" * (SIZE + 1), "expected at most 262144 characters, found more"),
        (
            "moments:\n" + RULE * 257,
            "rules: expected at most 256, found 257. One pattern",
        ),
        (f"parameters: {{new: [{','.join(f'a{n}' for n in range(257))}]}}", "parameters: new: exp"),
        (f"moments: [{{match: {'w' * 300}}}]", "it has 300 characters; expected at most 256"),
        ("moments: [{match: 're:(a*)*\\1'}]", r"cannot be matched in linear time; expected"),
        (
            f"moments: [{{match: 'w[{'9' * 5000}:]'}}]",
            "a number of at most 18 digits, found",
        ),
        (f"moments: [{{match: w ndim={'9' * 5000}}}]", "ndim: expected a number of at most 18 dig"),
        (
            f"moments: [{{match: {{rows: ':{'9' * 5000}'}}}}]",
            "a number of at most 18 digits, found",
        ),
        (
            f"moments: [{{match: w, exp_avg: prune-random 0.5 seed {'9' * 5000}}}]",
            "expected a number of at most 64 characters, found one of 5000",
        ),
        ("step: 0001-01-01t00:00:00+99:59", "not YAML: offset must be"),
    ],
)
def test_what_a_stranger_writes_is_bounded(text: str, message: str) -> None:
    begin = time.process_time()
    assert message in refusal(text)
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    "text",
    ["a" * SIZE, "a " * (SIZE // 2), "\n" * SIZE, "a: " * (SIZE // 3)],
)
def test_a_large_file_is_refused_in_time_and_its_error_is_short(text: str) -> None:
    begin = time.process_time()
    with contextlib.suppress(PolicyError):
        loads(text)
        return
    assert time.process_time() - begin < 10
    assert len(refusal(text)) < 50_000


@pytest.mark.parametrize(
    "number", ["1e-5", "1e5", "1.5e3", "1.5e+3", "0.5", "1.", ".5", "2", "0.0"]
)
def test_a_plain_number_is_read_as_people_read_it(number: str) -> None:
    (rule,) = loads(
        f"hyperparameters: {{groups: [{{match: {{wd_mult: {number}}}, keep: [eps]}}]}}"
    ).groups
    assert rule.match == (("wd_mult", float(number)),)


def test_a_text_may_look_like_any_number() -> None:
    policy = loads("phase: 0100\nmoments: [{match: {name: 0x10, rows: 1:30}, exp_avg: reset}]")
    assert policy.phase == "0100"
    assert policy.rules[0].match == Match("0x10", (1, 30))


@pytest.mark.parametrize("kind", ["pipe", "device", "directory"])
def test_a_policy_is_a_regular_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    expected = "directory" if kind == "directory" else "expected a regular file"
    with pytest.raises(PolicyError, match=f"{re.escape(str(path))}: cannot be read: .*{expected}"):
        read(path)


# --- the schema


def accepted(content: Any) -> bool:
    return bool(VALIDATOR.is_valid(content))


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["additionalProperties"] is False


@given(policy=POLICIES)
def test_the_schema_accepts_every_policy_that_is_written(policy: ResumePolicy) -> None:
    written = json.loads(json.dumps(to_dict(policy)))
    assert [e.message for e in VALIDATOR.iter_errors(written)] == []


# Values that are right in some places and wrong in most.
_SCALARS = st.sampled_from(
    [
        *(None, True, 0, 1, -1, 0.5, 4, "", "2", "1e-3", "two", "w[3:]", "re:(", "3:5", "5:3"),
        *("keep", "reset", "args", "checkpoint", "error", "eps", "lr", "betas", "clip_grad"),
        *("scale 2", " scale  2 ", "scale -2", "scale 1_0", "scale", "fill mean", "fill median"),
        *("prune 2", "prune-random 0.5 seed -3", "batch-size 4", "floor .5", "bias-consistent"),
        *("gradient-scale 2", "batch-size 1 4", "batch-size 1  4 ", "relora 0.5", "relora"),
        *CATALOGUE,
    ]
)


def _some(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({}, optional=fields)


def _mostly(likely: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 11).flatmap(lambda n: likely if n else _SCALARS)


_KEYS = st.lists(_mostly(st.sampled_from(KEEPABLE)), max_size=2)
_GROUPS = st.dictionaries(st.sampled_from(("wd_mult", "a")), _SCALARS, max_size=2)
_OPERATION = _mostly(st.sampled_from(("keep", "reset", "scale 0.5", "fill median", "floor 1")))
_MATCH = _mostly(
    _some(
        name=_mostly(st.sampled_from(("*", "w"))),
        rows=_mostly(st.sampled_from(("3:", ":", ":5"))),
        ndim=_mostly(st.integers(-1, 3)),
        group=_GROUPS,
    )
)
_NUMBERS = _mostly(st.sampled_from((1, 0.5, "1e-3")))
_PARTS = _mostly(
    st.lists(st.sampled_from(("lr", "eps", "betas", "clip_grad", "exp_avg_sq")), max_size=2)
)
_POLICY = dict(
    hyperparameters=_mostly(
        _some(
            source=_mostly(st.sampled_from(("args", "checkpoint"))),
            keep=_mostly(_KEYS),
            take=_mostly(_KEYS),
            groups=_mostly(
                st.lists(
                    st.fixed_dictionaries(
                        {"match": _GROUPS, "keep": _KEYS}, optional={"take": _KEYS}
                    ),
                    max_size=2,
                )
            ),
        )
    ),
    schedule=_mostly(st.sampled_from(("args", "checkpoint"))),
    preset=_mostly(
        st.one_of(
            st.sampled_from(tuple(CATALOGUE)),
            st.fixed_dictionaries(
                {"name": st.sampled_from(tuple(CATALOGUE))},
                optional={k: _NUMBERS for k in ("s", "old", "new", "p")} | {"decline": _PARTS},
            ),
            st.fixed_dictionaries(
                {"name": st.just("batch-size"), "old": _NUMBERS, "new": _NUMBERS},
                optional={"decline": _PARTS},
            ),
        )
    ),
    moments=_mostly(
        st.lists(
            st.fixed_dictionaries(
                {"match": _MATCH}, optional={"exp_avg": _OPERATION, "exp_avg_sq": _OPERATION}
            ),
            max_size=2,
        )
    ),
    step=_mostly(st.sampled_from(("keep", "reset", 7))),
    nonfinite=_mostly(st.sampled_from(("error", "reset", "keep"))),
    master_weights=_mostly(st.sampled_from(("checkpoint", "model"))),
    strict=_mostly(st.booleans()),
    counters=_mostly(
        _some(
            iteration=_mostly(st.sampled_from(("keep", "reset"))),
            dataloader=_mostly(st.sampled_from(("keep", "reset"))),
            schedule=_mostly(st.sampled_from(("continue", "restart"))),
            grad_scaler=_mostly(st.sampled_from(("keep", "reset"))),
        )
    ),
    phase=_mostly(st.sampled_from(("", "second", "2.1"))),
    strcit=st.booleans(),
)


_DICTS = _some(**{k: v for k, v in _POLICY.items() if k != "strcit"}) | _some(**_POLICY)


@settings(max_examples=300)
@given(content=_DICTS)
def test_what_is_read_the_schema_accepts(content: dict[str, Any]) -> None:
    try:
        policy = from_dict(content)
    except PolicyError:
        return
    VALIDATOR.validate(content)
    assert from_dict(to_dict(policy)) == policy


@pytest.mark.parametrize(
    "content",
    [
        [],
        {"presett": "reset"},
        {"preset": "restart"},
        {"preset": "batch-size 4"},
        {"preset": {"name": "gradient-scale"}},
        {"preset": {"name": "gradient-scale", "s": True}},
        {"preset": {"name": "gradient-scale", "s": 0}},
        {"preset": {"name": "relora", "p": 1.5}},
        {"preset": {"name": "reset", "decline": ["lr"]}},
        {"preset": {"name": "batch-size", "old": 1, "new": 4, "decline": ["clip_grad"]}},
        {"hyperparameters": {"keep": "eps"}},
        {"hyperparameters": {"keep": ["lr"]}},
        {"hyperparameters": {"keep": ["eps", "eps"]}},
        {"hyperparameters": {"source": "both"}},
        {"hyperparameters": {"groups": [{"match": {}, "keep": ["eps"]}]}},
        {"hyperparameters": {"groups": [{"match": {"a": 1}}]}},
        {"hyperparameters": {"groups": [{"match": {"a": [1]}, "keep": ["eps"]}]}},
        {"schedule": "stock"},
        {"moments": {"match": "w"}},
        {"moments": [{"exp_avg": "reset"}]},
        {"moments": [{"match": ""}]},
        {"moments": [{"match": "w", "exp_avg": "zero"}]},
        {"moments": [{"match": "w", "exp_avg": "scale"}]},
        {"moments": [{"match": "w", "exp_avg_sq": "fill mode"}]},
        {"moments": [{"match": {"rows": 3}}]},
        {"moments": [{"match": {"rows": "3"}}]},
        {"moments": [{"match": {"ndim": -1}}]},
        {"moments": [{"match": {"ndim": True}}]},
        {"step": -1},
        {"step": None},
        {"step": True},
        {"nonfinite": "ignore"},
        {"master_weights": "args"},
        {"strict": "no"},
        {"counters": {"iteration": True}},
        {"counters": {"schedule": "keep"}},
        {"counters": {"step": "reset"}},
        {"phase": 2},
        {"phase": "second phase"},
    ],
)
def test_the_schema_and_the_reader_reject_the_same_wrong_policies(content: Any) -> None:
    assert not accepted(content)
    with pytest.raises(PolicyError):
        from_dict(content)


def test_every_preset_is_in_the_schema_with_its_numbers_and_what_can_be_declined() -> None:
    of_schema = {
        entry["properties"]["name"]["const"]: entry
        for entry in SCHEMA["properties"]["preset"]["oneOf"]
        if "properties" in entry
    }
    assert set(of_schema) == set(CATALOGUE)
    for name, entry in CATALOGUE.items():
        properties = of_schema[name]["properties"]
        numbers = [a.lower() for a in entry.arguments]
        assert of_schema[name]["required"] == ["name", *numbers]
        decline = properties.get("decline", {"items": {"enum": []}})["items"]["enum"]
        assert decline == list(entry.declinable)
        assert set(properties) == {"name", *numbers, *(["decline"] if decline else [])}
        assert entry.source in of_schema[name]["description"] or name == "keep"
