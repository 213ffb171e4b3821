"""The offline commands answer of a Bridge checkpoint what they answer of Megatron's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ext.offline.comparison import compare
from megatron_ext.offline.edit import edit
from megatron_ext.offline.inspection import inspect_checkpoint
from tests.bridge.conftest import FIRST, TRAIN, FirstPhases
from tests.support.bridge_runs import GLOBAL_BATCH, Bridge
from tests.support.pool import RankPool

pytestmark = pytest.mark.ranks

LOWER = 1e-3


def test_inspect_knows_counters_sizes_and_arguments(first: FirstPhases) -> None:
    start, _ = first(2)
    found = inspect_checkpoint(start)
    assert found.iteration == FIRST
    assert found.counters["consumed_train_samples"] == FIRST * GLOBAL_BATCH
    assert found.layout == {"tp": 1, "pp": 1, "cp": 1, "ep": 1, "etp": 1}
    assert "no arguments were saved" not in found.notes
    expected = {
        "lr": 1e-2,
        "min_lr": 1e-3,
        "weight_decay": 0.1,
        "lr_warmup_iters": 1,
        "lr_decay_iters": 20,
        "lr_decay_style": "linear",
        "global_batch_size": GLOBAL_BATCH,
        "bf16": True,
        "use_distributed_optimizer": True,
        "train_iters": FIRST,
    }
    assert expected.items() <= found.args.items()
    # A config has no number of ranks, and its transformer_impl is not that of a spec of one's own.
    assert not {"world_size", "data_parallel_size", "transformer_impl"} & found.args.keys()


def test_plan_shows_the_first_step_that_bridge_makes(bridge: RankPool, first: FirstPhases) -> None:
    start, _ = first(1)
    words = ["plan", start, "--json", "--lr", "1e-3", "--min-lr", "1e-4", "--train-iters", "5"]
    ((status, text),) = bridge.run("tests.support.bridge_calls:command", 1, argv=words)
    plan = json.loads(text)
    (run,) = bridge.run(TRAIN, 1, run=Bridge(FIRST + 1, load=start, lr=LOWER), resume={})
    assert status == 0, text
    assert plan["counters"]["consumed_train_samples"] == {
        "checkpoint": FIRST * GLOBAL_BATCH,
        "value": FIRST * GLOBAL_BATCH,
    }
    assert [f["lr"] for f in plan["scheduler"]["first_step"]] == run["steps"][0]["lr"]


def test_diff_names_what_differs_in_the_configs(
    bridge: RankPool, first: FirstPhases, tmp_path: Path
) -> None:
    start, _ = first(1)
    later = Bridge(FIRST + 1, load=start, save=str(tmp_path), lr=LOWER)
    bridge.run(TRAIN, 1, run=later, resume={})
    both = [inspect_checkpoint(path) for path in (start, tmp_path)]
    found = {(d.section, d.name): (d.a, d.b) for d in compare(*both)}
    assert found["args", "lr"] == (1e-2, LOWER)
    assert found["args", "train_iters"] == (FIRST, FIRST + 1)
    counted = found["counters", "consumed_train_samples"]
    assert counted == (FIRST * GLOBAL_BATCH, (FIRST + 1) * GLOBAL_BATCH)


def test_stock_bridge_resumes_an_edited_copy(
    bridge: RankPool, first: FirstPhases, tmp_path: Path
) -> None:
    start, saved = first(2)
    edit(start, tmp_path / "edited", {"max_lr": LOWER, "min_lr": LOWER / 10})
    run = Bridge(FIRST + 1, load=str(tmp_path / "edited"), lr=LOWER)
    resumed = bridge.run(TRAIN, 2, run=run)
    for before, after in zip(saved, resumed, strict=True):
        assert after["begin"]["class"] == "DistributedOptimizer"
        assert after["steps"][0]["iteration"] == FIRST
        pairs = zip(before["end"]["moments"], after["begin"]["moments"], strict=True)
        assert all(a[k].tobytes() == b[k].tobytes() for a, b in pairs for k in a)
