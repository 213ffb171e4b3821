"""The launcher on GPUs with the real FusedAdam. Skipped where there is no GPU or no FusedAdam."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.support.training import run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not any(importlib.util.find_spec(m) for m in ("transformer_engine", "apex")),
        reason="needs Transformer Engine or apex",
    ),
]

COMMON = (
    "--bf16 --use-distributed-optimizer --ckpt-format torch_dist --distributed-backend nccl "
    "--lr-decay-iters 20"
)


@pytest.mark.parametrize("sharding", ["", "--dist-ckpt-optim-fully-reshardable"])
def test_a_resume_on_the_gpu(sharding: str, tmp_path: Path) -> None:
    world = min(2, torch.cuda.device_count())
    checkpoint = tmp_path / "checkpoint"
    first = run(
        tmp_path / "first",
        f"{COMMON} {sharding} --lr 3e-4 --min-lr 3e-5 --train-iters 10 --save {checkpoint}",
        world=world,
        launcher="",
    )
    assert first.returncode == 0, first.log[-3000:]
    second = run(
        tmp_path / "second",
        f"{COMMON} {sharding} --lr 3e-5 --min-lr 2e-5 --train-iters 14 --load {checkpoint} "
        "--optimizer-class megatron_ext.SelectiveAdam --selective-report {report}",
        world=world,
        launcher="",
    )
    assert second.returncode == 0, second.log[-3000:]
    assert second.lrs[0] == pytest.approx(2e-5 + 1e-5 * (1 - 11 / 20))
    assert second.report is not None
    assert "FusedAdam" in second.report["optimizers"][0]["kind"]
    assert second.report["optimizers"][0]["step"]["value"] == 10
