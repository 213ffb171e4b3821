"""The same optimizer saved by buckets and by parameters, with the layout of the buckets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ext.hooks import buckets
from megatron_ext.resume import members

from . import harness, subject
from .harness import Hyper, Layout
from .unsharded import gather


def saved_both_ways(
    layout: Layout, hyper: Hyper, steps: int, directory: str, more: int = 0
) -> list[Any]:
    """Train and save in both formats; the unsharded state. With `more` train on, save ``later``."""
    run = subject.build(layout, hyper)
    harness.train(run, steps)
    found = buckets.bucket_layout(members.members_of(run.optimizer))
    assert found is not None
    if dist.get_rank() == 0:
        found.write(Path(directory))
    states = [gather(run)]
    for name in ("fully_reshardable", "dp_reshardable"):
        run.layout = replace(layout, format=name)
        harness.save(run, f"{directory}/{name}")
    if more:
        harness.train(run, more)
        states.append(gather(run))
        harness.save(run, f"{directory}/later")
    return states


def layout_of_none(hyper: Hyper) -> Any:
    """Of an optimizer that is not distributed."""
    run = subject.build(Layout(distributed=False), hyper)
    return buckets.bucket_layout(members.members_of(run.optimizer))
