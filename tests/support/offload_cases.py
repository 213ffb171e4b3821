"""CPU offload: resumes and live changes of this package."""

from __future__ import annotations

from typing import Any

import megatron_ext
from megatron_ext.policy import yaml_file

from . import harness
from .harness import Layout
from .offload_stock import HYPER, MORE, state_of, steps_of
from .policies import build


def resumed(layout: Layout, directory: str, policy: str) -> dict[str, Any]:
    """The state after a load with a policy, and some steps later."""
    run = build(layout, HYPER, policy)
    harness.load(run, directory)
    loaded = state_of(run)
    harness.train(run, MORE)
    return {
        "loaded": loaded,
        "trained": state_of(run),
        "steps": steps_of(run),
        "losses": run.losses,
    }


def changed_live(layout: Layout, directory: str, policy: str, ours: bool) -> dict[str, Any]:
    """The state after `transform_moments`, on an optimizer of this package or of stock."""
    run = build(layout, HYPER, "{}") if ours else harness.build(layout, HYPER)
    harness.load(run, directory)
    megatron_ext.transform_moments(run.optimizer, yaml_file.loads(policy))
    changed = state_of(run)
    harness.train(run, MORE)
    return {"loaded": changed, "trained": state_of(run), "steps": steps_of(run)}
