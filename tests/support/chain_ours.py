"""A chain of phases that are saved and resumed with this package."""

from __future__ import annotations

import gc
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from . import chain, harness
from .harness import Layout
from .policies import build


def resumed(layout: Layout, count: int, steps: int, directory: str) -> list[dict[str, Any]]:
    """The losses of each phase, the state at its end, and the process's memory."""
    found: list[dict[str, Any]] = []
    before: Path | None = None
    saved_as = chain.FORMATS[0]
    for number, phase in enumerate(chain.phases(count)):
        policy = f"{{{phase.moments}, phase: phase-{number}}}"
        run = build(replace(layout, format=saved_as), phase.hyper, policy)
        if before is not None:
            harness.load(run, str(before))
        harness.train(run, steps)
        saved_as = phase.saved_as
        run.layout = replace(layout, format=saved_as)
        target = Path(directory) / f"phase{number}"
        harness.save(run, str(target))
        dist.barrier()
        if before is not None and dist.get_rank() == 0:
            shutil.rmtree(before)
        before = target
        result = {"losses": run.losses, "state": harness.snapshot(run)}
        del run
        gc.collect()
        found.append({**result, "memory": chain.resident()})
    return found
