"""The launcher on a GPU with NCCL: real runs of Megatron, stock's and ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.support.training import Training, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("megatron") is None, reason="needs Megatron"),
    # Stock's resume on a GPU ends with an error where it has to take torch's AdamW (0.19.2).
    pytest.mark.skipif(
        not any(importlib.util.find_spec(m) for m in ("transformer_engine", "apex")),
        reason="needs Transformer Engine or apex",
    ),
]

COMMON = (
    "--bf16 --use-distributed-optimizer --ckpt-format torch_dist --distributed-backend nccl "
    "--lr-decay-iters 20 --min-lr 2e-5"
)
OURS = "--optimizer-class megatron_ext.SelectiveAdam --selective-report {report}"
WORLD = min(2, torch.cuda.device_count())


def train(directory: Path, arguments: str) -> Training:
    found = run(directory, f"{COMMON} {arguments}", world=WORLD, launcher="")
    assert found.returncode == 0, found.log[-3000:]
    return found


def test_resumes_on_the_gpu(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    train(tmp_path / "first", f"--lr 3e-4 --train-iters 6 --save {saved}")
    load = f"--load {saved} --train-iters 10"
    stock = train(tmp_path / "stock", f"--lr 3e-4 {load}")
    same = train(tmp_path / "same", f"--lr 3e-4 {load} {OURS}")
    assert len(stock.losses) == 4
    assert same.losses == stock.losses
    changed = train(
        tmp_path / "changed", f"--lr 3e-5 {load} {OURS} --selective-preset reset-momentum"
    )
    assert changed.lrs[0] == pytest.approx(2e-5 + 1e-5 * (1 - 7 / 20))
    assert changed.losses != stock.losses
    for found in (same, changed):
        assert found.report is not None
        (optimizer,) = found.report["optimizers"]
        assert optimizer["step"]["value"] == 6
    # The compiled kernel counted the moments, and wrote them where a rule asked for it.
    assert "moments on cuda: compiled kernel" in same.log
    assert "moments on cuda: compiled kernel" in changed.log
