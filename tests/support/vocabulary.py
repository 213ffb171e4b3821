"""A vocabulary of another size with this package."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.resume import members

from . import harness
from .harness import Hyper, Layout
from .policies import build
from .unsharded import gather, weights


def resumed(
    layout: Layout, hyper: Hyper, directory: str, policies: dict[str, str], steps: int = 0
) -> dict[str, dict[str, Any]]:
    """For each policy, by name: state and weights after the load and after some steps, reports."""
    return {
        name: _resumed(layout, hyper, directory, text, steps) for name, text in policies.items()
    }


def _resumed(
    layout: Layout, hyper: Hyper, directory: str, policy: str, steps: int
) -> dict[str, Any]:
    run = build(layout, hyper, policy)
    harness.load(run, directory)
    report = members.members_of(run.optimizer)[0].resume.report
    out = {
        "state": gather(run),
        "weights": weights(run),
        "steps": harness.snapshot(run)["steps"],
        "report": report.to_json(),
        "lines": report.lines(),
    }
    if steps:
        harness.train(run, steps)
        trained = {"state": gather(run), "weights": weights(run), "losses": run.losses}
        out["trained"] = trained
    return out


def refused(layout: Layout, hyper: Hyper, directory: str) -> dict[str, Any]:
    """The error of a resume, whether anything was changed, and whether the ranks are in step."""
    run = build(layout, hyper, "{}")
    before = harness.snapshot(run)
    try:
        harness.load(run, directory)
    except Exception as e:
        after = harness.snapshot(run)
        same = [(a == b).all() for a, b in zip(before["weights"], after["weights"], strict=True)]
        same += [
            (one["param"] == two["param"]).all()
            for one, two in zip(before["shards"], after["shards"], strict=True)
        ]
        total = torch.ones(1)
        dist.all_reduce(total)
        return {
            "type": type(e).__name__,
            "message": str(e),
            "unchanged": all(same) and before["groups"] == after["groups"],
            "in step": int(total) == dist.get_world_size(),
        }
    return {"type": "", "message": "", "unchanged": False, "in step": True}


def loaded_twice(layout: Layout, hyper: Hyper, directory: str, other: str) -> dict[str, Any]:
    """A resume from a smaller vocabulary, then one from a checkpoint of the same size."""
    run = build(layout, hyper, "{}")
    harness.load(run, directory)
    harness.load(run, other, scheduler=False)
    report = members.members_of(run.optimizer)[0].resume.report
    return {"state": gather(run), "weights": weights(run), "report": report.to_json()}
