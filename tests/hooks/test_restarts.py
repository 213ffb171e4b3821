"""A transition happens exactly once: phase 2 is killed and started again with the same command.

Every rank is killed with SIGKILL after a save, or before the first one. The run that was never
killed is the oracle: the same losses as logged, the same state in the last checkpoint bit for bit.
"""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.runs import TOKENS, Runs, Scenario, needs_training, ok, runs_of
from tests.support.training import Training, Zygote

pytestmark = [
    pytest.mark.e2e,
    needs_training,
]

FORMAT = "--bf16 --use-distributed-optimizer --ckpt-format torch"
PHASE_1 = f"--lr 3e-4 --min-lr 3e-5 --train-iters 10 --lr-decay-iters 40 {FORMAT}"
#: Saves after each second iteration.
OTHERS = f"--lr 3e-5 --min-lr 2e-5 {FORMAT} --save-interval 2 --adam-beta2 0.95"
PHASE_2 = f"{OTHERS} --train-iters 16 --lr-decay-iters 40"
OURS = "--optimizer-class megatron_ext.SelectiveAdam --selective-report {report}"

#: Policy -> its flags, and iterations with which the run begins.
POLICIES = {
    "reset": ("--selective-preset reset", 10),
    "reset momentum": ("--selective-preset reset-momentum", 10),
    "bias consistent": ("--selective-preset bias-consistent --adam-beta1 0.8", 10),
    "gradient scale": ("--selective-preset gradient-scale 0.5", 10),
    "relora": ("--selective-preset relora 0.9", 10),
    "random": ("--selective-policy tests/support/policy_random.yaml", 10),
    "batch size": ("--selective-preset batch-size 8 16 --global-batch-size 16", 10),
    "scale and rows": ("--selective-policy tests/support/policy_rows.yaml", 10),
    "step": ("--selective-step 3", 10),
    "schedule": ("--selective-schedule restart --lr-warmup-iters 3", 10),
    "iteration": ("--reset-iteration", 0),
    "data": ("--reset-dataloader", 10),
    # By samples the last iteration depends on what has been counted before the batch size changed.
    "iteration by samples": (
        "--reset-iteration --global-batch-size 4 --train-samples 24 --lr-decay-samples 320",
        0,
    ),
    "data by samples": (
        "--reset-dataloader --global-batch-size 16 --train-samples 176 --lr-decay-samples 320",
        10,
    ),
    "all counters and moments": (
        "--reset-iteration --reset-dataloader --selective-preset reset --selective-step reset",
        0,
    ),
}


def _arguments(policy: str) -> str:
    flags = POLICIES[policy][0]
    return f"{OTHERS if '--train-samples' in flags else PHASE_2} {OURS} {flags}"


def _last(policy: str) -> int:
    """The last iteration of the phase."""
    return 6 if policy == "iteration by samples" else 16


def _own(name: str) -> str:
    """The directories of a phase: where it starts, and its own."""
    return f"--selective-from {{phase 1}} --load {{{name}}} --save {{{name}}}"


def _micro_batch(policy: str, iteration: int) -> int:
    """The first micro-batch of the n-th iteration of the run."""
    sizes = re.findall(r"--global-batch-size (\d+)", POLICIES[policy][0]) or ["8"]
    return int(sizes[0]) // 2 * (iteration - 1) + 1


SCENARIOS = {"phase 1": Scenario(PHASE_1, saves=True)}
for policy in POLICIES:
    plain = Scenario(
        f"{_arguments(policy)} {_own(f'{policy}, never killed')}",
        after=("phase 1",),
        script=TOKENS,
    )
    SCENARIOS[f"{policy}, never killed"] = plain
    for when, iteration in (("after a save", 4), ("before the first save", 2)):
        name = f"{policy}, killed {when}"
        killed = replace(
            plain,
            arguments=f"{_arguments(policy)} {_own(name)}",
            kill_at=_micro_batch(policy, iteration),
        )
        SCENARIOS[name] = killed
        SCENARIOS[f"{name}, again"] = replace(killed, kill_at=None, after=(*killed.after, name))
KILLS = ("after a save", "before the first save")
CASES = list(itertools.product(POLICIES, KILLS))
#: Run without --all too: every counter, and of the moments' rules what has to be remembered most
#: exactly. `tests/resume/test_phases.py` has every policy, on the layouts of several ranks.
CHOSEN = [
    (policy, KILLS[number % 2])
    for number, policy in enumerate(
        (
            "reset",
            "random",
            "batch size",
            "iteration",
            "iteration by samples",
            "data by samples",
            "all counters and moments",
        )
    )
]


def _more(name: str, arguments: str, *, after: str, **changes: object) -> None:
    SCENARIOS[name] = Scenario(arguments, after=(after,), script=TOKENS, **changes)  # type: ignore[arg-type]


# Another learning rate at the restart; the oracle resumes without any operation.
LOWER = "--lr 1e-5 --min-lr 5e-6"
RESET = _arguments("reset")
_more(
    "new lr, killed",
    f"{RESET} {_own('new lr, killed')}",
    after="phase 1",
    kill_at=_micro_batch("reset", 4),
)
_more("new lr, again", f"{RESET} {_own('new lr, killed')} {LOWER}", after="new lr, killed")
_more(
    "new lr, stopped",
    f"{RESET} {_own('new lr, stopped')} --exit-interval 12",
    after="phase 1",
)
_more(
    "new lr, resumed",
    f"{PHASE_2} {OURS} {LOWER} --load {{new lr, stopped}}",
    after="new lr, stopped",
)

# A stock phase in between, from the same directory.
_more(
    "stock between, killed",
    f"{RESET} {_own('stock between, killed')}",
    after="phase 1",
    kill_at=_micro_batch("reset", 4),
)
_more(
    "stock between",
    f"{PHASE_2} --load {{stock between, killed}} --save {{stock between, killed}} "
    "--exit-interval 14",
    after="stock between, killed",
)
_more("stock between, again", f"{RESET} {_own('stock between, killed')}", after="stock between")

# One directory for both phases; and phases after it, with the same policy and another name.
_more(
    "one directory, phase 1",
    f"{PHASE_1} --save {{one directory}} --save-interval 5",
    after="phase 1",
)
ONE = "--load {one directory} --save {one directory}"
_more(
    "one directory, killed",
    f"{RESET} {ONE}",
    after="one directory, phase 1",
    kill_at=_micro_batch("reset", 4),
)
_more("one directory", f"{RESET} {ONE}", after="one directory, killed")
_more(
    "one directory, third phase",
    f"{RESET} {ONE} --selective-phase third --train-iters 18",
    after="one directory",
)
_more(
    "one directory, third phase again",
    f"{RESET} {ONE} --selective-phase third --train-iters 20",
    after="one directory, third phase",
)

# The batch size doubled twice, each phase killed once.
DOUBLE = f"{PHASE_2} {OURS} --global-batch-size"


def _doubled(killed: bool) -> None:
    kind = "killed" if killed else "never killed"
    second, third = f"doubled once, {kind}", f"doubled twice, {kind}"
    twice = f"--selective-from {{{second}}} --load {{{third}}} --save {{{third}}} --train-iters 22"
    for name, arguments, before, micro_batches in (
        (second, f"{DOUBLE} 16 --selective-preset batch-size 8 16 {_own(second)}", "phase 1", 8),
        (third, f"{DOUBLE} 32 --selective-preset batch-size 16 32 {twice}", second, 16),
    ):
        last = before
        if killed:
            _more(f"{name}, first", arguments, after=before, kill_at=3 * micro_batches + 1)
            last = f"{name}, first"
        _more(name, arguments, after=last)


_doubled(killed=False)
_doubled(killed=True)

# Two ranks, torch_dist.
DIST = f"{_arguments('reset')} --ckpt-format torch_dist"
SCENARIOS |= {
    "ranks phase 1": Scenario(f"{PHASE_1} --ckpt-format torch_dist", world=2, saves=True),
    "ranks, never killed": Scenario(
        f"{DIST} --selective-from {{ranks phase 1}} --load {{ranks, never killed}} "
        "--save {ranks, never killed}",
        world=2,
        after=("ranks phase 1",),
        script=TOKENS,
    ),
    "ranks, killed": Scenario(
        f"{DIST} --selective-from {{ranks phase 1}} --load {{ranks, killed}} "
        "--save {ranks, killed}",
        world=2,
        after=("ranks phase 1",),
        script=TOKENS,
        kill_at=7,
    ),
}
SCENARIOS["ranks, again"] = replace(
    SCENARIOS["ranks, killed"], kill_at=None, after=("ranks, killed",)
)


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, zygote: Zygote
) -> Iterator[Runs]:
    yield from runs_of(SCENARIOS, request, tmp_path_factory.mktemp("runs"), zygote)


def state(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint, by the file and the place it is stored in."""
    iteration = int((directory / "latest_checkpointed_iteration.txt").read_text())
    found: dict[str, torch.Tensor] = {}
    for file in sorted((directory / f"iter_{iteration:07d}").rglob("*.pt")):
        _collect(f"{iteration}/{file.name}", torch.load(file, weights_only=False), found)
    return found


def _collect(name: str, value: object, found: dict[str, torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found[name] = value
    elif isinstance(value, dict):
        for key, item in value.items():
            _collect(f"{name}/{key}", item, found)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _collect(f"{name}/{number}", item, found)


def assert_same_state(one: Path, other: Path) -> None:
    first, second = state(one), state(other)
    assert first.keys() == second.keys()
    assert sum("exp_avg" in name for name in first) >= 2
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_goes_on_as(again: Training, whole: Training) -> None:
    """The iterations of a restarted run are the last of one that was never killed."""

    def table(run: Training) -> list[tuple[int, int, float]]:
        return [(i, samples, lr) for i, (samples, lr, _) in run.iterations.items()]

    count = len(again.iterations)
    assert count >= 2
    assert table(again) == table(whole)[-count:]
    assert len(again.exact_losses) == count
    assert again.exact_losses == whole.exact_losses[-count:]


def went_on(again: Training) -> bool:
    """Whether the phase was continued; it is said loudly, and in the report."""
    assert again.report is not None
    state = again.report["phase"]["state"]
    assert ("megatron_ext: CONTINUED" in again.log) == (state == "continued")
    assert ("megatron_ext: TRANSITION APPLIED" in again.log) == (state == "applied")
    return state == "continued"


_executed: list[tuple[str, str]] = []


@pytest.mark.parametrize(
    ("policy", "when"),
    [
        pytest.param(
            *case,
            marks=[
                pytest.mark.reads(
                    f"{case[0]}, never killed", f"{case[0]}, killed {case[1]}, again"
                ),
                *([] if case in CHOSEN else [pytest.mark.all]),
            ],
            id=", killed ".join(case),
        )
        for case in CASES
    ],
)
def test_a_killed_phase_ends_as_if_it_had_not_been_killed(
    policy: str, when: str, runs: Runs
) -> None:
    whole = ok(runs[f"{policy}, never killed"])
    killed = runs[f"{policy}, killed {when}"]
    again = ok(runs[f"{policy}, killed {when}, again"])
    first = POLICIES[policy][1]
    after_a_save = when == "after a save"
    assert list(whole.iterations) == list(range(first + 1, _last(policy) + 1))
    assert list(killed.iterations) == list(range(first + 1, first + (4 if after_a_save else 2)))
    begins = first + 2 if after_a_save else first
    assert list(again.iterations) == list(range(begins + 1, _last(policy) + 1))
    assert not went_on(whole)
    assert went_on(again) == after_a_save
    assert_goes_on_as(again, whole)
    assert again.rows == whole.rows[-len(again.rows) :]
    assert_same_state(
        runs.checkpoint(f"{policy}, never killed"), runs.checkpoint(f"{policy}, killed {when}")
    )
    _executed.append((policy, when))


def test_so_many_policies_were_killed(request: pytest.FixtureRequest) -> None:
    if not _executed:
        pytest.skip("the matrix was deselected")
    wanted = CASES if request.config.getoption("--all") else CHOSEN
    assert sorted(_executed) == sorted(wanted)
    assert (len(CASES), len(CHOSEN)) == (30, 7)
    assert {when for _, when in CHOSEN} == set(KILLS)
    formats = {re.findall(r"--ckpt-format (\S+)", s.arguments)[-1] for s in SCENARIOS.values()}
    assert formats == {"torch", "torch_dist"}


@pytest.mark.reads("new lr, again", "new lr, resumed")
def test_another_learning_rate_at_a_restart_is_no_new_transition(runs: Runs) -> None:
    again, oracle = ok(runs["new lr, again"]), ok(runs["new lr, resumed"])
    assert went_on(again)
    assert list(again.iterations) == [13, 14, 15, 16]
    assert_goes_on_as(again, oracle)
    assert oracle.report["phase"]["state"] == "none"
    assert again.lrs == pytest.approx([5e-6 + 5e-6 * (1 - i / 40) for i in range(13, 17)])


@pytest.mark.reads("stock between, again", "reset, never killed")
def test_a_stock_phase_in_between(runs: Runs) -> None:
    whole = ok(runs["reset, never killed"])
    stock, again = ok(runs["stock between"]), ok(runs["stock between, again"])
    assert list(stock.iterations) == [13, 14]
    said = {line for line in stock.log.splitlines() if line.startswith("megatron_ext: ")}
    assert all(line.startswith("megatron_ext: megatron-core ") for line in said)
    assert went_on(again)
    assert list(again.iterations) == [15, 16]
    assert stock.exact_losses == whole.exact_losses[2:4]
    assert_goes_on_as(again, whole)
    assert_same_state(
        runs.checkpoint("reset, never killed"), runs.checkpoint("stock between, killed")
    )


@pytest.mark.reads("one directory, third phase again", "reset, never killed")
def test_one_directory_for_all_phases(runs: Runs) -> None:
    whole, again = ok(runs["reset, never killed"]), ok(runs["one directory"])
    assert not went_on(whole)
    assert went_on(again)
    assert_goes_on_as(again, whole)
    third, third_again = (
        ok(runs[f"one directory, third phase{again}"]) for again in ("", " again")
    )
    assert not went_on(third)
    assert third.report["optimizers"][0]["step"] == {"value": 0, "checkpoint": 6, "taken": "policy"}
    assert third.report["phase"]["name"] == "third"
    assert went_on(third_again)
    assert third_again.report["optimizers"][0]["step"]["value"] == 2


@pytest.mark.reads("doubled twice, killed", "doubled twice, never killed")
def test_a_batch_size_doubled_twice(runs: Runs) -> None:
    """The same rule with the same ratio in both phases: two transitions, each once."""
    for name in ("doubled once", "doubled twice"):
        whole, again = ok(runs[f"{name}, never killed"]), ok(runs[f"{name}, killed"])
        assert not went_on(whole)
        assert not went_on_before_the_kill(runs[f"{name}, killed, first"])
        assert went_on(again)
        assert len(again.iterations) == 4
        assert_goes_on_as(again, whole)
        assert_same_state(
            runs.checkpoint(f"{name}, never killed"), runs.checkpoint(f"{name}, killed")
        )


def went_on_before_the_kill(killed: Training) -> bool:
    assert len(killed.iterations) == 3
    return "megatron_ext: CONTINUED" in killed.log


@pytest.mark.reads("ranks, again", "ranks, never killed")
def test_two_ranks_and_a_distributed_checkpoint(runs: Runs) -> None:
    whole, killed = ok(runs["ranks, never killed"]), runs["ranks, killed"]
    again = ok(runs["ranks, again"])
    assert list(killed.iterations) == [11, 12, 13]
    assert killed.returncode == -signal.SIGKILL
    assert went_on(again)
    assert list(again.iterations) == [13, 14, 15, 16]
    assert_goes_on_as(again, whole)
