"""Iteration, data position and schedule, each by itself, in runs of an unmodified script.

What a row has to be is computed by hand here: the learning rate from the schedule's formula, the
token ids from a run that was never interrupted.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from packaging.version import Version

from megatron_ext.demo import corpus
from megatron_ext.offline.forecast import forecast
from tests.support.runs import TOKENS, Runs, Scenario, needs_training, ok, runs_of
from tests.support.training import Training, Zygote

pytestmark = [
    pytest.mark.e2e,
    needs_training,
]

BATCH, FIRST, LAST = 8, 10, 24
LR, MIN_LR, DECAY = 3e-5, 2e-5, 40

FORMAT = "--bf16 --use-distributed-optimizer --ckpt-format torch"
#: How the length of a run is given -> of phase 1, of the runs after it, with a batch of 8.
LENGTHS = {
    "iters": (
        f"--train-iters {FIRST} --lr-decay-iters {DECAY}",
        f"--train-iters {LAST} --lr-decay-iters {DECAY}",
    ),
    "samples": (
        f"--train-samples {FIRST * BATCH} --lr-decay-samples {DECAY * BATCH}",
        f"--train-samples {LAST * BATCH} --lr-decay-samples {DECAY * BATCH}",
    ),
}
PHASE_1 = f"--lr 3e-4 --min-lr 3e-5 {FORMAT}"
PHASE_2 = f"--lr {LR} --min-lr {MIN_LR} {FORMAT} --override-opt_param-scheduler"
OURS = "--optimizer-class megatron_ext.SelectiveAdam --selective-report {report}"

#: The iteration at which `REWIND` goes on.
REWOUND = 4
REWIND = f"--override-ckpt-iteration {REWOUND}"

#: Thresholds are tokens, of which a sample has 16. Commas, because words are split at spaces.
STEPS = "--step-batch-size-schedule 0:4,0.64K:8"

BLEND = (
    "--vocab-size 300 --data-path 0.5 {directory}/text 0.5 {directory}/text --split 100,0,0 "
    "--data-cache-path {directory}/cache"
)

#: Flags -> iteration, data position and schedule position (in iterations) that the run begins at.
COMBINATIONS = {
    "": (FIRST, FIRST, FIRST),
    "--reset-iteration": (0, FIRST, 0),
    "--reset-dataloader": (FIRST, 0, FIRST),
    "--reset-iteration --reset-dataloader": (0, 0, 0),
    "--selective-schedule restart": (FIRST, FIRST, 0),
    "--reset-iteration --selective-schedule continue": (0, FIRST, FIRST),
    "--reset-dataloader --selective-schedule restart": (FIRST, 0, 0),
}
CASES = list(itertools.product(LENGTHS, COMBINATIONS))
#: Every combination with one of the units; the others are run with --all.
CHOSEN = [(list(LENGTHS)[number % 2], flags) for number, flags in enumerate(COMBINATIONS)]
#: Batch size, unit and flags: every pair of two.
BATCHES = list(itertools.product((4, 16), LENGTHS, ("", "--reset-iteration")))
CHOSEN_BATCHES = [
    (4, "iters", ""),
    (4, "samples", "--reset-iteration"),
    (16, "iters", "--reset-iteration"),
    (16, "samples", ""),
]

SCENARIOS = {
    "uninterrupted": Scenario(f"{PHASE_1} --train-iters 60 --lr-decay-iters 60", script=TOKENS),
    **{
        f"phase 1 {unit}": Scenario(f"{PHASE_1} {first}", saves=True, script=TOKENS)
        for unit, (first, _) in LENGTHS.items()
    },
    **{
        f"{unit} {flags}": Scenario(
            f"{PHASE_2} {LENGTHS[unit][1]} {OURS} {flags}", f"phase 1 {unit}", script=TOKENS
        )
        for unit, flags in CASES
    },
    # The batch size changes in samples, so the last iteration does.
    **{
        f"batch {batch} {unit} {flags}": Scenario(
            f"{PHASE_2} {LENGTHS[unit][1]} {OURS} {flags} --global-batch-size {batch} "
            "--eval-iters 2 --eval-interval 3",
            f"phase 1 {unit}",
            script=TOKENS,
        )
        for batch, unit, flags in BATCHES
    },
    # A blend of datasets has no sample more than is asked for.
    "blend phase 1": Scenario(f"{PHASE_1} {LENGTHS['iters'][0]} {BLEND}", saves=True),
    "blend": Scenario(
        f"{PHASE_2} {LENGTHS['iters'][1]} {BLEND} {OURS} --reset-iteration", "blend phase 1"
    ),
    # The command of Megatron-LM #963, its three flags verbatim.
    "issue 963": Scenario(
        f"--lr {LR} --min-lr {MIN_LR} --bf16 --use-distributed-optimizer --train-iters 4 "
        f"--lr-decay-iters {DECAY} --ckpt-format torch_dist {OURS} --reset-dataloader "
        "--override-opt_param-scheduler --reset-iteration --tensorboard-dir {issue 963}-events "
        "--tensorboard-log-interval 1",
        "issue 963 phase 1",
        saves=True,
        script=TOKENS,
    ),
    # Megatron 0.19's own flag, which it applies after it has read the checkpoint's counters.
    "rewound": Scenario(
        f"--lr {LR} --min-lr {MIN_LR} --bf16 --use-distributed-optimizer --train-iters 8 "
        f"--lr-decay-iters {DECAY} --ckpt-format torch_dist {OURS} {REWIND}",
        "issue 963 phase 1",
        script=TOKENS,
    ),
    "rewound legacy": Scenario(
        f"{PHASE_2} --train-iters 8 --lr-decay-iters {DECAY} {OURS} {REWIND}",
        "phase 1 iters",
        script=TOKENS,
    ),
    # 4 samples an iteration up to sample 40, then 8: iteration 10 ends at sample 40.
    "steps phase 1": Scenario(f"{PHASE_1} {LENGTHS['iters'][0]} {STEPS}", saves=True),
    "steps": Scenario(
        f"{PHASE_2} --train-iters 12 --lr-decay-iters {DECAY} {STEPS} {OURS}",
        "steps phase 1",
        world=2,
    ),
    # Twice the learning rate at the same position of the schedule, and more weight decay.
    "raised": Scenario(
        f"--lr 6e-4 --min-lr 3e-5 --weight-decay 0.04 {FORMAT} {OURS} --train-iters {FIRST + 1} "
        f"--lr-decay-iters {DECAY}",
        "phase 1 iters",
        script=TOKENS,
    ),
    "issue 963 phase 1": Scenario(
        f"--lr 3e-4 --min-lr 3e-5 --bf16 --use-distributed-optimizer --train-iters {FIRST} "
        f"--lr-decay-iters {DECAY} --ckpt-format torch_dist",
        saves=True,
        script=TOKENS,
    ),
}


def read(cases: list[Any], chosen: list[Any], prefix: str = "") -> list[Any]:
    """The cases as parameters, each with the runs that its test reads."""
    out = []
    for case in cases:
        name = " ".join(map(str, case))
        marks = [pytest.mark.reads("uninterrupted", prefix + name)]
        if case not in chosen:
            marks.append(pytest.mark.all)
        out.append(pytest.param(*case, marks=marks, id=name.strip()))
    return out


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Runs]:
    directory = tmp_path_factory.mktemp("runs")
    corpus.build(directory / "text", megabytes=0.1)
    yield from runs_of(SCENARIOS, request, directory, zygote)


def logged(position: int) -> float:
    """What is logged of the schedule at a position, in iterations of 8 samples."""
    return MIN_LR + (LR - MIN_LR) * (1 - position / DECAY)


def batches(run: Training, size: int = BATCH) -> list[list[tuple[int, ...]]]:
    """The token ids of each iteration's samples."""
    return [list(batch) for batch in itertools.batched(run.rows, size)]


def table(run: Training, size: int = BATCH) -> list[tuple[int, int, float, list[tuple[int, ...]]]]:
    """Iteration, consumed samples, learning rate and token ids of each logged iteration."""
    rows = run.iterations.items()
    return [
        (iteration, samples, lr, batch)
        for (iteration, (samples, lr, _)), batch in zip(rows, batches(run, size), strict=True)
    ]


_executed: list[tuple[str, str]] = []


@pytest.mark.parametrize(("unit", "flags"), read(CASES, CHOSEN))
def test_the_first_ten_rows_are_those_computed_by_hand(unit: str, flags: str, runs: Runs) -> None:
    stream = batches(ok(runs["uninterrupted"]))
    assert len({tuple(map(tuple, b)) for b in stream}) == len(stream) == 60
    iteration, data, schedule = COMBINATIONS[flags]
    expected = [
        (
            iteration + k,
            (data + k) * BATCH,
            pytest.approx(logged(schedule + k)),
            stream[data + k - 1],
        )
        for k in range(1, 11)
    ]
    found = table(ok(runs[f"{unit} {flags}"]))
    assert found[:10] == expected
    # The run goes on to the iteration that its arguments name, whatever it began at.
    assert found[-1][0] == LAST
    report = runs[f"{unit} {flags}"].report["counters"]
    assert report["iteration"] == {"checkpoint": FIRST, "value": iteration}
    assert report["consumed_train_samples"] == {"checkpoint": FIRST * BATCH, "value": data * BATCH}
    assert report["num_steps"] == {"checkpoint": FIRST * BATCH, "value": schedule * BATCH}
    _executed.append((unit, flags))


def test_so_many_combinations_ran(request: pytest.FixtureRequest) -> None:
    if not _executed:
        pytest.skip("the combinations were deselected")
    wanted = CASES if request.config.getoption("--all") else CHOSEN
    assert sorted(_executed) == sorted(wanted)
    assert (len(CASES), len(CHOSEN)) == (14, 7)


@pytest.mark.parametrize(("batch", "unit", "flags"), read(BATCHES, CHOSEN_BATCHES, "batch "))
def test_a_changed_batch_size_goes_on_at_the_same_sample(
    batch: int, unit: str, flags: str, runs: Runs
) -> None:
    stream = [row for b in batches(ok(runs["uninterrupted"])) for row in b]
    found = table(ok(runs[f"batch {batch} {unit} {flags}"]), batch)
    begin = FIRST * BATCH
    first = 0 if flags else FIRST
    # 192 samples, of which the first phase has counted 80 unless the count begins again.
    last = LAST if unit == "iters" else first + (LAST * BATCH - first * BATCH) // batch
    assert [row[0] for row in found] == list(range(first + 1, last + 1))
    expected = [
        (first + k, begin + k * batch, stream[begin + (k - 1) * batch : begin + k * batch])
        for k in range(1, len(found) + 1)
    ]
    assert [(i, samples, rows) for i, samples, _, rows in found] == expected
    # --lr-decay-iters are iterations of the new batch, --lr-decay-samples are samples.
    decay = DECAY * (batch if unit == "iters" else BATCH)
    positions = [first * BATCH + k * batch for k in range(1, len(found) + 1)]
    wanted = [MIN_LR + (LR - MIN_LR) * max(0.0, 1 - p / decay) for p in positions]
    assert [lr for _, _, lr, _ in found] == pytest.approx(wanted)
    warnings = runs[f"batch {batch} {unit} {flags}"].report["optimizers"][0]["warnings"]
    assert any(f"goes from {BATCH} to {batch}" in w and "data position" in w for w in warnings)


@pytest.mark.reads("steps")
def test_a_batch_size_schedule_is_not_a_changed_batch_size(runs: Runs) -> None:
    """Megatron's global_batch_size is then micro batch size times DP: 2, and 4 with 2 ranks."""
    found = ok(runs["steps"])
    assert [samples for samples, _, _ in found.iterations.values()] == [48, 56]
    assert found.report["optimizers"][0]["warnings"] == []
    assert found.report["scheduler"]["global_batch_size"] == {"checkpoint": 8, "value": None}
    checkpoint, words = runs.checkpoint("steps phase 1"), runs.words("steps")
    assert not any("batch size" in w for w in forecast(checkpoint, words).all_warnings)


@pytest.mark.reads("raised")
def test_a_rate_that_jumps_is_told_with_both_numbers(runs: Runs) -> None:
    found = ok(runs["raised"])
    before, after = (3e-5 + (lr - 3e-5) * (1 - FIRST / DECAY) for lr in (3e-4, 6e-4))
    rate, decay = found.report["optimizers"][0]["warnings"]
    assert f"learning rate is {after:.6g}, {after / before:.2f}x the last used one, " in rate
    assert f"{before:.6g}" in rate
    # Biases and norms have no weight decay.
    assert "weight decay is 0.04, 4.00x the last used one, 0.01 (param_group 0)" in decay
    for warning in (rate, decay):
        assert f"WARNING: {warning}" in found.log
    checkpoint, words = runs.checkpoint("phase 1 iters"), runs.words("raised")
    unknown, *said = forecast(checkpoint, words).all_warnings
    assert "param_groups are not known" in unknown  # a legacy checkpoint names no parameters
    assert said == [rate, decay]


@pytest.mark.reads("blend")
def test_there_is_data_up_to_the_last_iteration(runs: Runs) -> None:
    """Stock asks for 24 x 8 samples; the run begins at the 80th and needs 24 x 8 more."""
    found = ok(runs["blend"])
    assert list(found.iterations) == list(range(1, LAST + 1))
    assert "train:      272" in found.log


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.reads("uninterrupted", name))
        for name in ("rewound", "rewound legacy")
    ],
)
def test_an_overridden_iteration_is_that_of_the_run_and_of_the_report(
    name: str, runs: Runs, megatron: Version
) -> None:
    if megatron < Version("0.19"):
        pytest.skip("--override-ckpt-iteration came with megatron-core 0.19")
    stream = batches(ok(runs["uninterrupted"]))
    found = table(ok(runs[name]))
    # The schedule stays where the checkpoint has it, as in stock.
    assert found == [
        (i, i * BATCH, pytest.approx(logged(FIRST + i - REWOUND)), stream[i - 1])
        for i in range(REWOUND + 1, 9)
    ]
    counters = runs[name].report["counters"]
    assert counters["iteration"] == {"checkpoint": FIRST, "value": REWOUND}
    assert counters["consumed_train_samples"] == {
        "checkpoint": FIRST * BATCH,
        "value": REWOUND * BATCH,
    }
    assert counters["num_steps"] == {"checkpoint": FIRST * BATCH, "value": FIRST * BATCH}
    assert f"iteration: {REWOUND} (checkpoint {FIRST}; --override-ckpt-iteration)" in runs[name].log


@pytest.mark.matrix
@pytest.mark.reads("issue 963")
def test_the_command_of_issue_963(runs: Runs, megatron: Version) -> None:
    """Its flags verbatim: a phase that starts at 0, with the moments kept."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from megatron_ext.checkpoint.stored import open_checkpoint

    found, before = ok(runs["issue 963"]), ok(runs["issue 963 phase 1"])
    assert table(found) == [
        (k, k * BATCH, pytest.approx(logged(k)), batches(before)[k - 1]) for k in range(1, 5)
    ]
    (optimizer,) = found.report["optimizers"]
    assert optimizer["step"] == {"value": FIRST, "checkpoint": FIRST, "taken": "checkpoint"}
    assert optimizer["moments"] is None
    assert optimizer["loaded"]["elements"]["exp_avg"] == 21760
    assert found.report["megatron_core"] == str(megatron)

    events = EventAccumulator(f"{runs.checkpoint('issue 963')}-events")
    events.Reload()
    assert [e.step for e in events.Scalars("lm loss")] == [1, 2, 3, 4]
    assert [e.step for e in events.Scalars("lm loss vs samples")] == [8, 16, 24, 32]
    assert [e.value for e in events.Scalars("learning-rate")] == pytest.approx(
        [logged(k) for k in range(1, 5)]
    )

    saved = open_checkpoint(runs.checkpoint("issue 963"))
    assert saved.iteration == 4
    assert saved.args["consumed_train_samples"] == 4 * BATCH
    assert saved.scheduler is not None
    assert saved.scheduler["num_steps"] == 4 * BATCH
    assert [o.step for o in saved.optimizers] == [FIRST + 4]
