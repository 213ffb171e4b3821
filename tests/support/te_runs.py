"""Resumes with TransformerEngine's FusedAdam, with this package."""

from __future__ import annotations

from typing import Any

import torch

import megatron_ext
from megatron_ext.policy import yaml_file
from megatron_ext.resume.members import members_of

from . import harness, policies
from .harness import Hyper, Layout
from .unsharded import gather


def resumed(
    layout: Layout, hyper: Hyper, directory: str, policy: str = "{}", more: int = 0
) -> dict[str, Any]:
    """Load, train and save nothing: the state after the load and after the steps."""
    run = policies.build(layout, hyper, policy)
    harness.load(run, directory)
    return _trained(run, more)


def saved_again(layout: Layout, hyper: Hyper, directory: str, target: str) -> dict[str, Any]:
    """Load and save: what was loaded."""
    run = policies.build(layout, hyper, "{}")
    harness.load(run, directory)
    harness.save(run, target)
    return {"state": gather(run)}


def transformed(
    layout: Layout, hyper: Hyper, directory: str | None, live: list[str], steps: int, more: int
) -> dict[str, Any]:
    """Load or not, train, apply policies to the live optimizer, a step after each, and train."""
    run = policies.build(layout, hyper, "{}")
    if directory is not None:
        harness.load(run, directory)
    harness.train(run, steps)
    for text in live:
        megatron_ext.transform_moments(run.optimizer, yaml_file.loads(text))
        changed = gather(run)
        harness.train(run, 1)
    return {**_trained(run, more), "changed": changed}


def _trained(run: harness.Run, more: int) -> dict[str, Any]:
    members = members_of(run.optimizer)
    report = members[0].resume.report
    loaded = {"state": gather(run), "steps": harness.snapshot(run)["steps"]}
    harness.train(run, more)
    return {
        **loaded,
        "losses": run.losses,
        "lrs": run.lrs,
        "wds": run.wds,
        "final": gather(run),
        "checked": all(m.moments_checked for m in members),
        "lines": report.lines() if report else [],
        "proven": report.optimizers[0].loaded.proven if report else 0,
        "nonfinite": report.optimizers[0].loaded.nonfinite if report else 0,
        "finite": all(bool(p.isfinite().all()) for p in _weights(run)),
    }


def _weights(run: harness.Run) -> list[torch.Tensor]:
    return [p for chunk in run.model for p in chunk.parameters()]
