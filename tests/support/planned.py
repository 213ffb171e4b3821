"""Command lines for `python -m megatron_ext plan`, as `tests/support/harness.py` is configured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .harness import GLOBAL_BATCH, Hyper


def words(hyper: Hyper) -> list[str]:
    """Megatron's arguments for the same hyperparameters."""
    values = {
        "lr": hyper.lr,
        "min-lr": hyper.min_lr,
        "weight-decay": hyper.weight_decay,
        "adam-beta1": hyper.betas[0],
        "adam-beta2": hyper.betas[1],
        "adam-eps": hyper.eps,
        "clip-grad": hyper.clip_grad,
        "train-iters": hyper.train_iters,
        "lr-decay-iters": hyper.train_iters,
        "lr-warmup-iters": hyper.warmup_iters,
        "lr-decay-style": hyper.decay_style,
        "weight-decay-incr-style": hyper.wd_incr_style,
        "start-weight-decay": hyper.start_wd,
        "end-weight-decay": hyper.end_wd,
        "decoupled-lr": hyper.decoupled_lr,
        "decoupled-min-lr": hyper.decoupled_min_lr,
        "global-batch-size": GLOBAL_BATCH,
    }
    return [w for k, v in values.items() if v is not None for w in (f"--{k}", str(v))]


_MEASURED = (
    "import re, sys, time; import torch; import megatron.core.optimizer_param_scheduler\n"
    "from megatron_ext.cli import main\n"
    "begin = time.process_time(); status = main(sys.argv[1:])\n"
    # Not getrusage: its peak is at least that of the process which started this one.
    "peak = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
    "print(time.process_time() - begin, peak * 1024, file=sys.stderr); sys.exit(status)"
)


def measured(directory: Path, *arguments: str) -> tuple[dict[str, Any], float, float]:
    """The plan of a process of its own, its CPU seconds without imports, its peak RSS in bytes."""
    command = [sys.executable, "-c", _MEASURED, "plan", str(directory), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    seconds, peak = map(float, done.stderr.splitlines()[-1].split())
    return json.loads(done.stdout), seconds, peak
