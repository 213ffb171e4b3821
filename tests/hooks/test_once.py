"""One load asks once: how often flags, preflight, phase and index are read in one process."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support.runs import needs_training
from tests.support.training import SCRIPT, Training, Zygote
from tests.support.zygote import COUNT_CALLS

pytestmark = [pytest.mark.e2e, needs_training]

COMMON = (
    "--lr-decay-iters 20 --bf16 --use-distributed-optimizer --ckpt-format torch_dist "
    "--ckpt-fully-parallel-load"
)
OURS = "--optimizer-class megatron_ext.SelectiveAdam --selective-report {report}"
#: Every question is asked here: moments are left unread, counters begin anew.
RESET = "--selective-preset reset --reset-iteration --reset-dataloader"

#: torch's reader is asked by Megatron twice: for the common state (load_common_state_dict), which
#: is not ours, and for the tensors.
ONCE = {"flags read": 1, "preflights": 1, "phases decided": 1, "indices read by torch": 2}
ON_RANK_0 = {"checkpoints opened": 1, "indices read": 1}


def calls(run: Training) -> dict[int, dict[str, int]]:
    """For each rank how often each function was called."""
    found = {rank: re.search(r"^CALLS (.*)$", log, re.M) for rank, log in run.ranks.items()}
    assert all(found.values()), run.log
    return {rank: json.loads(match[1]) for rank, match in found.items() if match}


def test_one_load_asks_once(zygote: Zygote, tmp_path: Path) -> None:
    def start(name: str, arguments: str) -> Training:
        run = zygote.run(
            tmp_path / name,
            arguments,
            launcher="--cpu",
            script=SCRIPT,
            world=2,
            env={COUNT_CALLS: "1"},
        )
        assert run.returncode == 0, run.log
        return run

    earlier, later = tmp_path / "earlier", tmp_path / "later"
    start("one", f"--lr 3e-4 --train-iters 4 {COMMON} --save {earlier}")
    found = start(
        "two",
        f"--lr 3e-5 --train-iters 3 {COMMON} {OURS} {RESET} --selective-from {earlier} "
        f"--load {later} --save {later}",
    )
    assert "TRANSITION APPLIED" in found.log
    assert calls(found) == {0: ONCE | ON_RANK_0, 1: ONCE | dict.fromkeys(ON_RANK_0, 0)}


def test_a_restart_asks_once_too(zygote: Zygote, tmp_path: Path) -> None:
    def start(name: str, iterations: int) -> Training:
        run = zygote.run(
            tmp_path / name,
            f"--lr 3e-5 --train-iters {iterations} {COMMON} {OURS} --load {tmp_path / 'own'} "
            f"--save {tmp_path / 'own'}",
            launcher="--cpu",
            script=SCRIPT,
            env={COUNT_CALLS: "1"},
        )
        assert run.returncode == 0, run.log
        return run

    nothing_there = calls(start("one", 2))[0]
    assert (nothing_there["flags read"], nothing_there["checkpoints opened"]) == (1, 0)
    assert calls(start("two", 4))[0] == ONCE | ON_RANK_0
