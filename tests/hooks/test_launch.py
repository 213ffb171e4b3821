"""The launcher with megatron.training: an unmodified script, real checkpoints, whole processes.

A process takes 10 s to import Megatron, so the runs are declared in one table, two run at a time,
and each test reads what its runs printed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from megatron_ext import launch
from megatron_ext.cli import main
from megatron_ext.offline.forecast import forecast
from megatron_ext.offline.plan_document import document
from tests.support.runs import Runs, Scenario, needs_training, ok, runs_of
from tests.support.training import ROOT, SCRIPT, Training, Zygote, run

pytestmark = [
    pytest.mark.e2e,
    needs_training,
]

PHASE_1 = "--lr 3e-4 --min-lr 3e-5 --train-iters 10 --lr-decay-iters 20"
PHASE_2 = "--lr 3e-5 --min-lr 2e-5 --train-iters 14 --lr-decay-iters 20"
DISTRIBUTED = "--bf16 --use-distributed-optimizer --ckpt-format torch_dist"
OURS = "--optimizer-class megatron_ext.SelectiveAdam --selective-report {report}"


SCENARIOS = {
    # The case of Megatron-LM #963 and #1284: flags verbatim.
    "phase 1": Scenario(f"{PHASE_1} {DISTRIBUTED}", saves=True, world=2),
    "stock": Scenario(f"{PHASE_2} {DISTRIBUTED} --override-opt_param-scheduler", "phase 1", 2),
    # The one that torchrun starts; its ranks import Megatron for themselves.
    "ours": Scenario(
        f"{PHASE_2} {DISTRIBUTED} --override-opt_param-scheduler {OURS}",
        "phase 1",
        world=2,
        saves=True,
        torchrun=True,
    ),
    "ours, no override flag": Scenario(f"{PHASE_2} {DISTRIBUTED} {OURS}", "phase 1", 2),
    "reset": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --selective-preset reset --ckpt-fully-parallel-load",
        "phase 1",
        world=2,
    ),
    "phase 3 stock": Scenario(
        f"{PHASE_2} {DISTRIBUTED} --train-iters 18 --override-opt_param-scheduler", "ours", 2
    ),
    "phase 3 ours": Scenario(f"{PHASE_2} {DISTRIBUTED} {OURS} --train-iters 18", "ours", 2),
    # Unchanged arguments.
    "single phase 1": Scenario(f"{PHASE_1} {DISTRIBUTED}", saves=True),
    "unchanged stock": Scenario(
        f"{PHASE_1} {DISTRIBUTED} --train-iters 14 --override-opt_param-scheduler",
        "single phase 1",
    ),
    "unchanged ours": Scenario(
        f"{PHASE_1} {DISTRIBUTED} --train-iters 14 {OURS}", "single phase 1"
    ),
    # Nothing is there: a name that was mistyped, or the first of many restarts.
    "nothing to load": Scenario(
        f"{PHASE_1} {DISTRIBUTED} {OURS} --train-iters 2 --load {{directory}}/mistyped", world=2
    ),
    # The same flags before the script's name.
    "flags first": Scenario(
        f"{PHASE_2} {DISTRIBUTED}",
        "single phase 1",
        launcher="--cpu --optimizer-class megatron_ext.SelectiveAdam",
    ),
    "own script": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS}",
        "single phase 1",
        script="tests/support/own_script.py",
    ),
    "the class alone": Scenario(
        f"{PHASE_1} {DISTRIBUTED} --train-iters 11 --override-opt_param-scheduler",
        "single phase 1",
        script="tests/support/class_script.py",
    ),
    "scheduler from checkpoint": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --use-checkpoint-opt_param-scheduler", "single phase 1"
    ),
    "keep max_lr": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --selective-keep-hyperparameters max_lr min_lr",
        "single phase 1",
    ),
    "batch size": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --global-batch-size 16 --train-iters 14 "
        "--selective-preset batch-size 8 16 --selective-decline lr betas "
        "--selective-rule embedding.word_embeddings.weight[64:] reset reset",
        "single phase 1",
    ),
    "policy file": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --selective-policy tests/support/policy.yaml",
        "single phase 1",
    ),
    "no-load-optim stock": Scenario(
        f"{PHASE_2} {DISTRIBUTED} --override-opt_param-scheduler --no-load-optim", "single phase 1"
    ),
    "evaluation": Scenario(f"{PHASE_2} {DISTRIBUTED} {OURS} --skip-train", "single phase 1"),
    "no-load-optim ours": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --no-load-optim", "single phase 1"
    ),
    "not distributed phase 1": Scenario(f"{PHASE_1} --bf16 --ckpt-format torch_dist", saves=True),
    "not distributed": Scenario(
        f"{PHASE_2} --bf16 --ckpt-format torch_dist {OURS}", "not distributed phase 1"
    ),
    "legacy phase 1": Scenario(
        f"{PHASE_1} --bf16 --use-distributed-optimizer --ckpt-format torch "
        "--tensor-model-parallel-size 2",
        saves=True,
        world=2,
    ),
    "legacy": Scenario(
        f"{PHASE_2} --bf16 --use-distributed-optimizer --ckpt-format torch {OURS} "
        "--tensor-model-parallel-size 2",
        "legacy phase 1",
        world=2,
    ),
    "adamw phase 1": Scenario(
        f"{PHASE_1} {DISTRIBUTED}", launcher="--cpu --cpu-adam torch", saves=True
    ),
    "adamw": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS}", "adamw phase 1", launcher="--cpu --cpu-adam torch"
    ),
    # Also there in real runs.
    "train-samples phase 1": Scenario(
        f"--lr 3e-4 --min-lr 3e-5 --train-samples 80 --lr-decay-samples 160 {DISTRIBUTED}",
        saves=True,
    ),
    "train-samples": Scenario(
        f"--lr 3e-5 --min-lr 2e-5 --train-samples 112 --lr-decay-samples 160 {DISTRIBUTED} {OURS}",
        "train-samples phase 1",
    ),
    "rampup phase 1": Scenario(
        "--lr 3e-4 --min-lr 3e-5 --train-samples 80 --lr-decay-samples 160 "
        f"--rampup-batch-size 4 2 40 {DISTRIBUTED}",
        saves=True,
    ),
    "rampup": Scenario(
        "--lr 3e-5 --min-lr 2e-5 --train-samples 112 --lr-decay-samples 160 "
        f"--rampup-batch-size 4 2 40 {DISTRIBUTED} {OURS}",
        "rampup phase 1",
    ),
    "phase-transition-iterations": Scenario(
        f"--lr 3e-5 --min-lr 2e-5 --train-samples 112 --lr-decay-samples 160 {DISTRIBUTED} {OURS} "
        "--phase-transition-iterations 12",
        "train-samples phase 1",
    ),
    "non-persistent phase 1": Scenario(
        f"{PHASE_1} {DISTRIBUTED} --non-persistent-save-interval 5 --save-interval 8 "
        "--non-persistent-ckpt-type global",
        saves=True,
    ),
    "non-persistent": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --non-persistent-ckpt-type global",
        "non-persistent phase 1",
    ),
    "local checkpoints": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --non-persistent-ckpt-type local "
        "--non-persistent-local-ckpt-dir /tmp/none"
    ),
    "async phase 1": Scenario(f"{PHASE_1} {DISTRIBUTED} --async-save", saves=True),
    "async": Scenario(f"{PHASE_2} {DISTRIBUTED} {OURS} --async-save", "async phase 1", saves=True),
    "override-ckpt-iteration": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --override-ckpt-iteration 5 --global-batch-size 4",
        "single phase 1",
    ),
    "no optimizer saved": Scenario(f"{PHASE_1} {DISTRIBUTED} --no-save-optim", saves=True, world=2),
    "no optimizer to load": Scenario(f"{PHASE_2} {DISTRIBUTED} {OURS}", "no optimizer saved", 2),
    # 128 rows with padding, then 384.
    "small vocabulary": Scenario(
        f"{PHASE_1} {DISTRIBUTED} --dist-ckpt-optim-fully-reshardable", saves=True, world=2
    ),
    "grown vocabulary": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --vocab-size 300 --ckpt-fully-parallel-load "
        "--selective-policy tests/support/grown.yaml",
        "small vocabulary",
        world=2,
    ),
    "grown vocabulary, finetune": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --vocab-size 300 --finetune", "small vocabulary", world=2
    ),
    "grown vocabulary, buckets": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --vocab-size 300", "phase 1", 2
    ),
    "grown vocabulary, legacy": Scenario(
        f"{PHASE_2} --bf16 --use-distributed-optimizer --ckpt-format torch {OURS} "
        "--tensor-model-parallel-size 2 --vocab-size 300",
        "legacy phase 1",
        world=2,
    ),
    "idle rule": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --selective-rule decoder.layers.7.* reset reset",
        "phase 1",
        2,
    ),
    "unknown key": Scenario(
        f"{PHASE_2} {DISTRIBUTED} {OURS} --selective-keep-hyperparameters max_lr momentum",
        "phase 1",
        2,
    ),
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Runs]:
    yield from runs_of(SCENARIOS, request, tmp_path_factory.mktemp("runs"), zygote)


def linear(lr: float, min_lr: float, iteration: int, decay: int = 20) -> float:
    """The logged learning rate: of the step after `iteration` steps, linear decay."""
    return min_lr + (lr - min_lr) * (1 - iteration / decay)


def refused_once(run: Training) -> str:
    """The launcher's error on rank 0, told once; every other rank has one line and no traceback."""
    begin = "python -m megatron_ext.launch: error"
    first, *others = (run.ranks[rank] for rank in sorted(run.ranks))
    assert first.count(f"{begin}: ") == 1
    for rank, text in enumerate(others, 1):
        (line,) = (one for one in text.splitlines() if one.startswith(begin))
        assert line.startswith(f"{begin} on rank {rank}: ")
        assert line.endswith(" (rank 0 prints the whole message)")
        assert len(line) < 350
    for text in (first, *others):
        assert "Traceback" not in text
        assert "usage:" not in text
    return first.partition(f"{begin}: ")[2]


@pytest.mark.reads("reset")
def test_moments_that_are_reset_are_not_read(runs: Runs) -> None:
    run = ok(runs["reset"])
    (optimizer,) = run.report["optimizers"]
    state, elements = optimizer["moments"]["state"], optimizer["loaded"]["elements"]
    for key in ("exp_avg", "exp_avg_sq"):
        assert state[key] == {
            "rms_before": None,
            "rms_after": 0.0,
            "changed": 0,
            "nonfinite": 0,
            "unread": elements["param"],
        }
        # The same in the counts and in the log.
        assert (elements[key], optimizer["loaded"]["tensors"][key]) == (0, 0)
        said = f"not loaded: {elements['param']} elements are overwritten without being read"
        assert [one for one in run.ranks[0].splitlines() if one.startswith(f" > {key}: ")] == [
            f" > {key}: {said}",
            f" > {key}: RMS (not read) -> 0, 0 elements changed, 0 not finite",
        ]
    assert elements["param"] > 1000
    assert list(run.iterations) == [11, 12, 13, 14]


@pytest.mark.matrix
@pytest.mark.reads("phase 1", "stock", "ours")
def test_the_case_of_the_first_users(runs: Runs, megatron: Version) -> None:
    """3e-4/3e-5, then --lr 3e-5 --min-lr 2e-5 --override-opt_param-scheduler."""
    assert ok(runs["phase 1"]).lrs[-1] == pytest.approx(linear(3e-4, 3e-5, 10))
    stock = runs["stock"]
    if megatron >= Version("0.19"):
        assert stock.returncode != 0
        assert "KeyError: (None, 3e-05, 2e-05" in stock.log
        assert stock.iterations == {}
    else:
        assert "overriding learning rate value to 3e-05" in ok(stock).log
        assert stock.lrs[0] == pytest.approx(linear(3e-4, 3e-5, 11))
    ours = ok(runs["ours"])
    assert list(ours.iterations) == [11, 12, 13, 14]
    assert ours.lrs == pytest.approx([linear(3e-5, 2e-5, i) for i in range(11, 15)])
    first = ours.report["scheduler"]["first_step"]
    assert [f["lr"] for f in first] == pytest.approx([linear(3e-5, 2e-5, 10)] * 2)
    assert [f["weight_decay"] for f in first] == [0.01, 0.0]
    assert "SelectiveAdam in place of DistributedOptimizer" in ours.log
    assert "> exp_avg: loaded from checkpoint" in ours.log
    assert "> first resumed step" in ours.log


@pytest.mark.reads("single phase 1", "flags first")
def test_the_command_that_a_plan_emits_is_that_run(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pasted into a shell in the script's folder, it trains as the run that was typed by hand."""
    expected = ok(runs["flags first"]).iterations
    words = ["plan", str(runs.checkpoint("single phase 1")), *PHASE_2.split()]
    assert main([*words, "--emit-command"]) == 0
    shutil.copy(SCRIPT, tmp_path / "pretrain_gpt.py")
    (tmp_path / "run.sh").write_text(capsys.readouterr().out)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "run.sh"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    log = done.stdout + done.stderr
    assert Training(done.returncode, log, {}, None).iterations == expected, log[-3000:]
    assert done.returncode == 0


@pytest.mark.reads("ours", "ours, no override flag")
def test_without_the_override_flag(runs: Runs) -> None:
    assert ok(runs["ours, no override flag"]).iterations == ok(runs["ours"]).iterations


@pytest.mark.matrix
@pytest.mark.reads("phase 3 stock", "phase 3 ours")
def test_the_way_back(runs: Runs) -> None:
    """Phase 3 without our flag, from phase 2's checkpoint."""
    stock = ok(runs["phase 3 stock"])
    assert list(stock.iterations) == [15, 16, 17, 18]
    assert stock.iterations == ok(runs["phase 3 ours"]).iterations


@pytest.mark.reads("nothing to load", "ours, no override flag")
def test_a_run_that_found_no_checkpoint_says_so_once(runs: Runs) -> None:
    run = ok(runs["nothing to load"])
    (line,) = (one for one in run.log.splitlines() if "NO CHECKPOINT" in one)
    path = runs.checkpoint("any").parents[1] / "mistyped"
    assert line == f"megatron_ext: NO CHECKPOINT in {path}: a new run, nothing resumed"
    assert line in run.ranks[0]
    assert list(run.iterations) == [1, 2]
    assert "NO CHECKPOINT" not in ok(runs["ours, no override flag"]).log


@pytest.mark.reads("unchanged stock", "unchanged ours")
def test_unchanged_arguments(runs: Runs) -> None:
    stock = ok(runs["unchanged stock"])
    assert list(stock.iterations) == [11, 12, 13, 14]
    assert stock.iterations == ok(runs["unchanged ours"]).iterations


@pytest.mark.reads("flags first", "own script")
def test_other_ways_in(runs: Runs) -> None:
    """Flags before the script; a script that passes add_arguments as extra_args_provider."""
    first, own = ok(runs["flags first"]), ok(runs["own script"])
    assert first.lrs == pytest.approx([linear(3e-5, 2e-5, i) for i in range(11, 15)])
    assert own.iterations == first.iterations
    assert own.report is not None


@pytest.mark.reads("the class alone", "own script")
def test_a_class_without_the_wrappers_says_so(runs: Runs) -> None:
    for name, count in (("the class alone", 1), ("own script", 0)):
        told = "WARNING: the optimizer was built without this package's launcher"
        assert ok(runs[name]).log.count(told) == count


@pytest.mark.matrix
@pytest.mark.reads("grown vocabulary", "grown vocabulary, finetune")
def test_a_grown_vocabulary(runs: Runs) -> None:
    found = ok(runs["grown vocabulary"])
    assert list(found.iterations) == [11, 12, 13, 14]
    (one,) = found.report["optimizers"]
    assert one["resized"] == [
        {
            "parameter": "embedding.word_embeddings.weight",
            "checkpoint_rows": 128,
            "rows": 384,
            "new_rows": 256,
            "dropped_rows": 0,
        }
    ]
    assert one["moments"]["rules"][0]["elements"] == 256 * 32
    assert not [w for w in one["warnings"] if "new rows" in w]
    assert "the weights of the 256 new rows [128:] stay as initialised" in found.log
    finetune = ok(runs["grown vocabulary, finetune"])
    assert "the 256 new rows [128:] stay as initialised" in finetune.log
    assert next(iter(finetune.iterations)) == 1


@pytest.mark.reads("grown vocabulary, buckets", "grown vocabulary, legacy")
def test_a_grown_vocabulary_that_the_format_does_not_allow(runs: Runs) -> None:
    kinds = {"buckets": "a dp_reshardable checkpoint", "legacy": "a torch checkpoint"}
    for name, form in kinds.items():
        refused = runs[f"grown vocabulary, {name}"]
        assert refused.returncode != 0
        assert refused.iterations == {}
        # By the preflight; tests/resume/test_vocabulary.py has what the load says.
        told = refused_once(refused)
        assert "padded vocabulary " in told
        assert form in told
        assert "--dist-ckpt-optim-fully-reshardable" in told
        assert "number of parameters" not in refused.log


@pytest.mark.reads("scheduler from checkpoint", "keep max_lr")
def test_values_from_the_checkpoint(runs: Runs) -> None:
    for name in ("scheduler from checkpoint", "keep max_lr"):
        kept = ok(runs[name])
        assert kept.lrs == pytest.approx([linear(3e-4, 3e-5, i) for i in range(11, 15)]), name


@pytest.mark.reads("batch size", "policy file")
def test_policies_from_flags_and_from_a_file(runs: Runs) -> None:
    found = ok(runs["batch size"])
    assert list(found.iterations) == [11, 12, 13, 14]
    assert found.report["policy"] == {
        "preset": {"name": "batch-size", "old": 8.0, "new": 16.0, "decline": ["lr", "betas"]},
        "moments": [
            {
                "match": "embedding.word_embeddings.weight[64:]",
                "exp_avg": "reset",
                "exp_avg_sq": "reset",
            }
        ],
    }
    (optimizer,) = found.report["optimizers"]
    assert optimizer["groups"][0]["keys"]["eps"]["value"] == pytest.approx(1e-8 / 2**0.5)
    assert optimizer["groups"][0]["keys"]["eps"]["taken"] == "preset"
    assert optimizer["moments"]["rules"][0]["elements"] == 64 * 32
    assert optimizer["moments"]["state"]["exp_avg_sq"]["changed"] > 64 * 32
    text = "\n".join(optimizer["warnings"])
    assert "the global batch size goes from 8 to 16" in text
    assert "betas is declined" in text
    found = ok(runs["policy file"])
    (optimizer,) = found.report["optimizers"]
    assert optimizer["step"] == {"value": 0, "checkpoint": 10, "taken": "policy"}
    assert optimizer["moments"]["state"]["exp_avg"]["rms_after"] == 0.0
    assert "re-warm-up of about 1000 steps" in found.log


@pytest.mark.reads("evaluation")
def test_a_run_that_only_evaluates_needs_no_optimizer(runs: Runs) -> None:
    run = ok(runs["evaluation"])
    assert run.iterations == {}
    assert run.report is None


@pytest.mark.reads("no-load-optim stock", "no-load-optim ours")
def test_no_load_optim_is_stock(runs: Runs) -> None:
    ours = ok(runs["no-load-optim ours"])
    assert ours.iterations == ok(runs["no-load-optim stock"]).iterations
    assert ours.log.count("--no-load-optim: the checkpoint's Adam moments are dropped") == 1
    assert ours.report is None


@pytest.mark.reads("not distributed")
def test_without_the_distributed_optimizer(runs: Runs) -> None:
    ours = ok(runs["not distributed"])
    assert ours.lrs == pytest.approx([linear(3e-5, 2e-5, i) for i in range(11, 15)])
    assert "without --use-distributed-optimizer" in ours.log
    assert ours.report["optimizers"][0]["kind"].startswith("SelectiveFloat16Optimizer")


@pytest.mark.reads("legacy", "adamw")
def test_legacy_format_and_torch_adamw(runs: Runs) -> None:
    for name in ("legacy", "adamw"):
        ours = ok(runs[name])
        assert ours.lrs == pytest.approx([linear(3e-5, 2e-5, i) for i in range(11, 15)]), name
        assert ours.report["optimizers"][0]["step"]["value"] == 10
        assert ours.report["optimizers"][0]["loaded"]["elements"]["exp_avg_sq"] > 0


@pytest.mark.reads("train-samples", "rampup")
def test_sample_based_schedules(runs: Runs) -> None:
    for name in ("train-samples", "rampup"):
        ours = ok(runs[name])
        assert ours.iterations
        for samples, lr, _ in ours.iterations.values():
            assert lr == pytest.approx(linear(3e-5, 2e-5, samples, 160)), name
    assert min(s for s, _, _ in runs["train-samples"].iterations.values()) == 88


@pytest.mark.reads("phase-transition-iterations")
def test_megatrons_own_phase_transitions(runs: Runs) -> None:
    """--phase-transition-iterations is another thing and goes on working."""
    ours = ok(runs["phase-transition-iterations"])
    # Megatron stops at the transition, iteration 12, and says so.
    assert list(ours.iterations) == [11, 12]
    assert ours.lrs == pytest.approx([linear(3e-5, 2e-5, i) for i in (11, 12)])


@pytest.mark.reads("non-persistent")
def test_a_global_non_persistent_checkpoint_wins(runs: Runs) -> None:
    ours = ok(runs["non-persistent"])
    assert list(ours.iterations) == [11, 12, 13, 14]
    assert "Loading from a non-persistent checkpoint" in ours.log
    assert ours.lrs == pytest.approx([linear(3e-5, 2e-5, i) for i in range(11, 15)])


@pytest.mark.reads("local checkpoints")
def test_local_checkpoints_are_refused(runs: Runs) -> None:
    refused = runs["local checkpoints"]
    assert refused.returncode == 2
    assert "with --non-persistent-ckpt-type local" in refused.log
    assert "precedence over --load" in refused.log


@pytest.mark.reads("async", "ours")
def test_async_save(runs: Runs) -> None:
    ours = ok(runs["async"])
    assert ours.lrs == pytest.approx([linear(3e-5, 2e-5, i) for i in range(11, 15)])
    assert (runs.checkpoint("async") / "iter_0000014" / ".metadata").is_file()


@pytest.mark.reads("override-ckpt-iteration")
def test_override_ckpt_iteration_keeps_its_own_check(runs: Runs) -> None:
    refused = runs["override-ckpt-iteration"]
    assert refused.returncode != 0
    assert "override-ckpt-iteration" in refused.log


@pytest.mark.reads("no optimizer to load", "unknown key", "idle rule")
def test_refusals_reach_every_rank(runs: Runs) -> None:
    for name, words in (
        ("no optimizer to load", ["holds no optimizer state", "--no-load-optim"]),
        ("idle rule", ["1 of 1 rules match no parameter", "--no-selective-strict"]),
        ("unknown key", ["'momentum'", "Known keys", "--selective-keep"]),
    ):
        refused = runs[name]
        assert refused.returncode != 0
        assert refused.iterations == {}
        assert sorted(refused.ranks) == [0, 1]
        if name == "unknown key":  # at the load
            for text in refused.ranks.values():
                assert "megatron_ext.errors.PlanError" in text
        else:
            told = refused_once(refused)
            assert "number of parameters" not in refused.log
            # The ranks stopped together.
            assert "all ranks stop, because of the error above" in told
        for word in words:
            assert word in refused.ranks[0]


#: Runs with a report, of checkpoints of all formats.
PLANNED = (
    "ours",
    "reset",
    "scheduler from checkpoint",
    "keep max_lr",
    "batch size",
    "policy file",
    "not distributed",
    "legacy",
    "adamw",
    "train-samples",
    "rampup",
    "grown vocabulary",
)


@pytest.mark.reads(*PLANNED)
@pytest.mark.parametrize("name", PLANNED)
def test_what_is_planned_is_what_is_done(name: str, runs: Runs) -> None:
    """`python -m megatron_ext plan` with the command line of the run; see test_plan_command.py."""
    report = ok(runs[name]).report
    loads = SCENARIOS[name].loads
    assert loads is not None
    said = document(forecast(runs.checkpoint(loads), runs.words(name)))
    assert said["errors"] == []
    assert said["arguments"]["complete"]
    assert [a["flag"] for a in said["arguments"]["assumed"]] == []
    for key in ("policy", "phase", "counters"):
        assert said[key] == report[key], key
    scheduler = dict(report["scheduler"])
    length = scheduler.pop("train_iters")
    # Whether a ramp has an effect depends on Megatron's version.
    expected = None if name == "rampup" else 8
    assert scheduler.pop("global_batch_size")["checkpoint"] == expected
    assert said["scheduler"] == scheduler
    assert {c["iterations"][-1] for c in said["curves"] if c["phase"] == 2} <= {length}
    for ours, theirs in zip(said["optimizers"], report["optimizers"], strict=True):
        for key in ("step", "clip_grad", "unused_saved_groups"):
            assert ours[key] == theirs[key]
        for one, other in zip(ours["groups"], theirs["groups"], strict=True):
            assert one == {k: v for k, v in other.items() if k != "parameters_on_rank_0"}
        unknown = {w for w in said["warnings"] if "param_groups are not known" in w}
        assert len(unknown) == (name == "legacy")
        assert set(theirs["warnings"]) == set(said["warnings"]) - unknown
        assert len(ours["resized"]) == len(theirs["resized"])
        if ours["rules"] is not None:
            elements = {r["rule"]: r["elements"] for r in ours["rules"]}
            moments = theirs["moments"] or {"rules": []}
            assert elements == {r["rule"]: r["elements"] for r in moments["rules"]}


BAD_STARTS = {
    "--optimizer-class no_such_package.Adam": ["no_such_package.Adam", "cannot be imported"],
    "--optimizer-class torch.optim.AdamW": ["expected a subclass of", "DistributedOptimizer"],
    "--optimizer-class megatron_ext.SelectiveAdam --yaml-cfg x.yaml": [
        "--yaml-cfg",
        "command line",
    ],
    "--optimizer-class megatron_ext.SelectiveAdam --optimizer sgd --use-distributed-optimizer": [
        "--optimizer sgd and --use-distributed-optimizer",
        "Leave --use-distributed-optimizer out",
    ],
    "--optimizer-class megatron_ext.SelectiveAdam --use-megatron-fsdp": ["--use-megatron-fsdp"],
    "--optimizer-class megatron_ext.SelectiveAdam --selective-keep-hyperparameters lr": [
        "'lr' cannot be kept",
        "'max_lr'",
    ],
    "--optimizer-class megatron_ext.SelectiveAdam --selective-preset rest": [
        "unknown preset 'rest'",
        "'reset'",
    ],
    "--optimizer-class megatron_ext.SelectiveAdam --selective-policy no/such.yaml": [
        "--selective-policy no/such.yaml",
        "cannot be read",
    ],
    "--optimizer-class megatron_ext.SelectiveAdam --selective-policy tests/support/policy.yaml "
    "--selective-step keep": ["--selective-step", "expected the file or the flags"],
    "--optimizer-class megatron_ext.SelectivAdam": ["Did you mean megatron_ext.SelectiveAdam?"],
    "--optimizer-class megatron-ext.SelectiveAdam": ["Did you mean megatron_ext.SelectiveAdam?"],
    "--optimizer-class megatron_ext.SelectiveAdam --optimizer-class torch.optim.AdamW": [
        "is given 2 times, with different classes: megatron_ext.SelectiveAdam, torch.optim.AdamW"
    ],
    "--optimizer-class megatron_ext.SelectiveAdam --lr x": ["argument --lr: invalid float value"],
    "--selective-preset": ["argument --selective-preset: expected at least one argument"],
}


@pytest.mark.parametrize("arguments", BAD_STARTS)
def test_bad_arguments_stop_before_the_script(
    arguments: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = tmp_path / "script.py"
    script.write_text("raise AssertionError('the script was started')\n")
    message = refusal_of([str(script), *arguments.split()], capsys)
    for word in BAD_STARTS[arguments]:
        assert word in message


def refusal_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message with which the launcher stops."""
    with pytest.raises(SystemExit) as exit_:
        launch.main(argv)
    assert exit_.value.code == 2
    text = capsys.readouterr().err
    assert "usage:" not in text
    assert text.count("python -m megatron_ext.launch: error: ") == 1
    return text.partition("python -m megatron_ext.launch: error: ")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("no_such_script.py", "no_such_script.py: no such script"),
        ("", "the following arguments are required: script"),
        ("--optimizer-clas x.py", "Did you mean --optimizer-class in place of --optimizer-clas?"),
        ("--lr 1 x.py", "--lr. Megatron's arguments stand after the script's name"),
    ],
)
def test_a_wrong_start_of_the_command_line(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal_of(words.split(), capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("late", [True, False])
def test_a_machine_without_a_gpu(
    late: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    script = tmp_path / "script.py"
    script.write_text("raise AssertionError('the script was started')\n")
    words = "--optimizer-class megatron_ext.SelectiveAdam --lr 1e-4 --train-iters 4"
    message = refusal_of([str(script), *words.split(), *(["--cpu"] if late else [])], capsys)
    assert f"python -m megatron_ext.launch --cpu {script} ..." in message
    assert ("--cpu stands after the script's name" in message) == late


def test_torchrun_shows_the_error_as_the_root_cause(tmp_path: Path) -> None:
    done = run(tmp_path, "", script=tmp_path / "no_such_script.py")
    assert done.returncode == 1
    assert "no_such_script.py: no such script" in refused_once(done)
    summary = (tmp_path / "torchrun.log").read_text().partition("Root Cause")[2]
    assert "rank      : 0 (local_rank: 0)" in summary
    assert "exitcode  : 2" in summary
    assert f"megatron_ext.errors.HostError: {tmp_path}/no_such_script.py: no such" in summary


def test_torchrun_shows_what_the_script_raised(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise ValueError('of the script')\n")
    done = run(tmp_path, "", script=script, launcher="", world=1)
    assert done.returncode == 1
    summary = (tmp_path / "torchrun.log").read_text().partition("Root Cause")[2]
    assert "ValueError: of the script" in summary
    assert "ValueError: of the script" in done.ranks[0]


def test_every_scenario_is_read() -> None:
    read = {
        name
        for value in globals().values()
        for mark in getattr(value, "pytestmark", [])
        if mark.name == "reads"
        for name in mark.args
    }
    for name in list(read):
        while (loads := SCENARIOS[name].loads) is not None:
            read.add(name := loads)
    assert read == set(SCENARIOS)
