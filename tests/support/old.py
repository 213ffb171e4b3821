"""Checkpoints as another Megatron writes them; this package is never imported here."""

from __future__ import annotations

from typing import Any

from . import harness
from .harness import Hyper, Layout
from .unsharded import gather


def written(
    layout: Layout, hyper: Hyper, steps: int, directory: str, nemo: bool = False
) -> dict[str, Any]:
    """Train and save; the version, and the unsharded state that was saved.

    With `nemo` the groups have the names that NeMo gives some of their keys.
    """
    import megatron.core

    run = harness.build(layout, hyper)
    harness.train(run, steps)
    if nemo:
        for inner in harness.inner_optimizers(run.optimizer):
            for group in inner.param_groups:
                for key in ("wd_mult", "lr_mult"):
                    group[f"pre_{key}"] = group.pop(key)
    harness.save(run, directory)
    return {
        "version": megatron.core.__version__,
        "state": gather(run),
        "steps": harness.snapshot(run)["steps"],
        "groups": harness.snapshot_groups(run),
    }


def loaded(layout: Layout, hyper: Hyper, directory: str) -> dict[str, Any]:
    """What stock Megatron loads, and that it can go on."""
    run = harness.build(layout, hyper)
    harness.load(run, directory)
    found = {"state": gather(run), "steps": harness.snapshot(run)["steps"]}
    harness.train(run, 1)
    return {**found, "losses": run.losses}
