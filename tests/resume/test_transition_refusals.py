"""What cannot be a transition stops on every rank before the first step; no file changes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.runs import Runs, Scenario, needs_training, ok, runs_of
from tests.support.training import Zygote

pytestmark = [
    pytest.mark.e2e,
    needs_training,
]

LEGACY = "--bf16 --use-distributed-optimizer --ckpt-format torch"
DIST = "--bf16 --use-distributed-optimizer --ckpt-format torch_dist"
PHASE_1 = "--lr 3e-4 --min-lr 3e-5 --train-iters 4 --lr-decay-iters 40"
PHASE_2 = "--lr 3e-5 --min-lr 2e-5 --train-iters 6 --lr-decay-iters 40"
CLASS = "--optimizer-class megatron_ext.SelectiveAdam"
RESET = f"{PHASE_2} {LEGACY} {CLASS} --selective-preset reset"
OWN = "--load {phase 2} --save {phase 2}"
NEW = "--load {phase 2}/new --save {phase 2}/new"

#: Case -> flags, and what the message has to say.
REFUSED = {
    "reset-iteration over another phase": (
        f"{PHASE_2} {LEGACY} {CLASS} --reset-iteration --load {{phase 1}} --save {{phase 1}}",
        ["--reset-iteration", "up to iteration 4", "overwrite", "--selective-from", "{phase 1}"],
    ),
    "finetune": (
        f"{PHASE_2} {LEGACY} {CLASS} --reset-iteration --finetune --load {{phase 1}}",
        ["--finetune", "iteration reset", "needs the checkpoint's optimizer", "Leave one"],
    ),
    "no-load-optim": (
        f"{RESET} --no-load-optim --load {{phase 1}}",
        ["--no-load-optim", "preset reset", "needs the checkpoint's optimizer"],
    ),
    "the same name, another policy": (
        f"{PHASE_2} {LEGACY} {CLASS} --selective-preset relora 0.5 --selective-phase second {OWN}",
        ["--selective-phase second", "'second'", "preset relora 0.5", "another name"],
    ),
    "own directory of another policy": (
        f"{PHASE_2} {LEGACY} {CLASS} --selective-preset relora 0.5 --selective-from {{phase 1}} "
        f"{OWN}",
        ["another phase", "'second'", "preset relora 0.5", "an empty one"],
    ),
    "own directory without a mark": (
        f"{RESET} --selective-from {{phase 2}} --load {{phase 1}} --save {{phase 1}}",
        ["another phase", "no mark", "an empty one"],
    ),
    "started elsewhere": (
        f"{RESET} --selective-phase second --selective-from {{other phase 1}} {OWN}",
        ["was started from", "expected the same checkpoint", "{other phase 1}"],
    ),
    "warm-up longer than decay": (
        f"{PHASE_2} {LEGACY} {CLASS} --selective-schedule restart --lr-warmup-iters 50 "
        "--load {phase 1}",
        ["--lr-warmup-iters 50", "40", "longer"],
    ),
    "a rate below the smallest": (
        f"--lr 3e-5 --min-lr 1e-4 --train-iters 6 {LEGACY} {CLASS} --load {{phase 1}}",
        ["--lr 3e-05 is below --min-lr 0.0001", "Write --min-lr 3e-05 or less"],
    ),
    "WSD without its length": (
        f"{PHASE_2} {LEGACY} {CLASS} --lr-decay-style WSD --load {{phase 1}}",
        ["--lr-decay-style WSD without --lr-wsd-decay-iters", "Write --lr-wsd-decay-iters"],
    ),
    "a weight decay that falls": (
        f"{PHASE_2} {LEGACY} {CLASS} --weight-decay-incr-style linear --start-weight-decay 0.2 "
        "--end-weight-decay 0.1 --load {phase 1}",
        ["--start-weight-decay 0.2 --end-weight-decay 0.1: this ramp falls", "Write an end"],
    ),
    "no optimizer to save, nor to load": (
        f"{PHASE_2} {DIST} {CLASS} --no-save-optim --load {{dist phase 1}}",
        ["--no-save-optim with a torch_dist checkpoint", "does not request", "Leave the flag out"],
    ),
    "from an empty directory": (
        f"{RESET} --selective-from {{phase 1}}/nothing {NEW}",
        ["--selective-from", "{phase 1}/nothing", "no checkpoint"],
    ),
    "from a checkpoint without optimizer": (
        f"{RESET} --selective-from {{no optimizer}} {NEW}",
        ["{no optimizer}", "no optimizer state", "--no-load-optim"],
    ),
    "nothing to start from": (
        f"{RESET} --load {{phase 1}}/nothing",
        ["preset reset", "holds no checkpoint", "--selective-from"],
    ),
    "two directories": (
        f"{RESET} --selective-from {{phase 1}} --load {{phase 1}}/a --save {{phase 1}}/b",
        ["--selective-from", "--load", "--save", "one directory"],
    ),
    "start and own the same": (
        f"{RESET} --selective-from {{phase 1}} --load {{phase 1}} --save {{phase 1}}",
        ["--selective-from", "{phase 1}", "another one"],
    ),
    "started before": (
        f"{RESET} --selective-phase second --load {{phase 1}} --save {{phase 2}}",
        ["has been started", "reached iteration 6", "--selective-from {phase 1}", "overwrite"],
    ),
    "override-ckpt-iteration": (
        f"{PHASE_2} {LEGACY} {CLASS} --reset-dataloader --override-ckpt-iteration 2 "
        "--load {phase 1}",
        ["--reset-dataloader", "--override-ckpt-iteration 2", "Leave one"],
    ),
    "a ramp and one reset": (
        "--lr 3e-5 --min-lr 2e-5 --train-samples 64 --lr-decay-samples 160 "
        f"--rampup-batch-size 4 2 40 {LEGACY} {CLASS} --reset-iteration --load {{phase 1}}",
        ["--reset-iteration", "--rampup-batch-size", "together"],
    ),
    "phase transitions": (
        "--lr 3e-5 --min-lr 2e-5 --train-samples 64 --lr-decay-samples 160 "
        f"--phase-transition-iterations 12 {LEGACY} {CLASS} --reset-iteration --load {{phase 1}}",
        ["--reset-iteration", "--phase-transition-iterations"],
    ),
    "another layout": (
        f"{PHASE_2} {DIST} {CLASS} --tensor-model-parallel-size 2 --load {{dist phase 1}}",
        ["--tensor-model-parallel-size 1 -> 2", "dp_reshardable", "--dist-ckpt-optim-fully"],
    ),
    "a grown vocabulary": (
        f"{PHASE_2} {DIST} {CLASS} --vocab-size 200 --load {{dist phase 1}}",
        ["padded vocabulary 128 -> 256", "dp_reshardable", "--dist-ckpt-optim-fully"],
    ),
    "not distributed": (
        f"{PHASE_2} --bf16 --ckpt-format torch_dist {CLASS} --load {{dist phase 1}}",
        ["with --use-distributed-optimizer", "without"],
    ),
    "flags without the class": (
        f"{PHASE_2} {LEGACY} --reset-iteration --reset-dataloader --load {{phase 1}}",
        ["--reset-iteration", "--reset-dataloader", "--optimizer-class"],
    ),
    "five things": (
        f"{PHASE_2} {DIST} --optimizer-class megatron_ext.NoSuchClass --selective-preset reset "
        "--no-load-optim --lr-warmup-iters 50 --use-torch-fsdp2 --selective-from {phase 1} "
        "--load {phase 1}/a --save {phase 1}/b",
        [
            "5 things are wrong",
            "1. ",
            "5. ",
            "NoSuchClass",
            "--no-load-optim with",
            "--lr-warmup-iters 50",
            "--use-torch-fsdp2",
            "one directory for --load and --save",
        ],
    ),
}

SCENARIOS = {
    "phase 1": Scenario(f"{PHASE_1} {LEGACY}", saves=True),
    "other phase 1": Scenario(f"{PHASE_1} {LEGACY} --seed 2", saves=True),
    "no optimizer": Scenario(f"{PHASE_1} {LEGACY} --no-save-optim", saves=True),
    "dist phase 1": Scenario(f"{PHASE_1} {DIST}", saves=True),
    "phase 2": Scenario(
        f"{RESET} --selective-phase second --selective-from {{phase 1}}",
        after=("phase 1",),
        saves=True,
    ),
    **{
        case: Scenario(
            arguments,
            after=("phase 1", "other phase 1", "no optimizer", "dist phase 1", "phase 2"),
            fails=True,
        )
        for case, (arguments, _) in REFUSED.items()
    },
    # Without the launcher the optimizer is the first that is ours: two ranks, one at fault.
    "own script": Scenario(
        f"{RESET} --lr-warmup-iters 50 --reset-iteration --no-load-optim --load {{phase 1}}",
        after=("phase 1",),
        script="tests/support/own_script.py",
        fails=True,
        world=2,
    ),
    "launcher, two ranks": Scenario(
        f"{RESET} --selective-from {{no optimizer}} --load {{phase 1}}/new --save {{phase 1}}/new",
        after=("no optimizer", "phase 1"),
        fails=True,
        world=2,
    ),
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Runs]:
    yield from runs_of(SCENARIOS, request, tmp_path_factory.mktemp("runs"), zygote)


def checksums(runs: Runs) -> dict[str, str]:
    """Of the checkpoints that the refused runs were pointed at."""
    return {
        str(file): hashlib.sha256(file.read_bytes()).hexdigest()
        for name in ("phase 1", "other phase 1", "no optimizer", "dist phase 1", "phase 2")
        for file in sorted(runs.checkpoint(name).rglob("*"))
        if file.is_file()
    }


def filled(text: str, runs: Runs) -> str:
    return re.sub(r"\{(.*?)\}", lambda m: str(runs.checkpoint(m[1])), text)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.reads(case)) for case in REFUSED]
)
def test_one_error_says_what_is_wrong_and_what_to_do(case: str, runs: Runs) -> None:
    for name in ("phase 1", "no optimizer", "dist phase 1", "phase 2"):
        ok(runs[name])
    run = runs[case]
    assert run.returncode not in (0, 1), run.log[-2000:]
    assert "Traceback" not in run.log
    assert run.iterations == {}
    (message,) = re.findall(r"^.*launch: error: (.*)", run.log, re.DOTALL | re.MULTILINE)
    for word in REFUSED[case][1]:
        assert filled(word, runs) in message
    # Before a model is built.
    assert "building GPT model" not in run.log
    assert "number of parameters" not in run.log


@pytest.mark.reads(*REFUSED)
def test_the_checkpoints_are_untouched(runs: Runs, tmp_path: Path) -> None:
    """The directories hold what their own runs have written, and nothing else."""
    for case in REFUSED:
        assert runs[case].returncode != 0
    found = checksums(runs)
    assert len(found) > 10
    for name, iteration in (("phase 1", 4), ("phase 2", 6), ("dist phase 1", 4)):
        root = runs.checkpoint(name)
        assert sorted(p.name for p in root.iterdir()) == [
            f"iter_{iteration:07d}",
            "latest_checkpointed_iteration.txt",
        ]
        assert (root / "latest_checkpointed_iteration.txt").read_text() == str(iteration)


@pytest.mark.reads("launcher, two ranks")
def test_the_launcher_stops_every_rank(runs: Runs) -> None:
    run = runs["launcher, two ranks"]
    assert run.returncode != 0
    assert sorted(run.ranks) == [0, 1]
    assert "no optimizer state" in run.ranks[0]
    assert "launch: error on rank 1: the preflight: stopped because 1 of 2 ranks" in run.ranks[1]
    assert "Traceback" not in run.log


@pytest.mark.reads("own script")
def test_a_script_of_ones_own_stops_on_every_rank(runs: Runs) -> None:
    run = runs["own script"]
    assert run.returncode != 0
    assert run.iterations == {}
    assert sorted(run.ranks) == [0, 1]
    for log in run.ranks.values():
        assert "2 things are wrong with this resume" in log or "AgreementError" in log
        assert "--no-load-optim with preset reset" in log
    assert "--lr-warmup-iters 50" in run.ranks[0]
