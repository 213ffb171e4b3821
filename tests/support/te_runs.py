"""Resumes with TransformerEngine's FusedAdam, with this package."""

from __future__ import annotations

import weakref
from typing import Any
from unittest import mock

import torch

import megatron_ext
from megatron_ext._ops import quantiles
from megatron_ext.base.placement import WHOLE
from megatron_ext.policy import yaml_file
from megatron_ext.resume import moments
from megatron_ext.resume.members import members_of
from megatron_ext.resume.shard_rules import MomentShard, RangeRule
from megatron_ext.rules.elementwise import Fill

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


def in_batches(
    layout: Layout, hyper: Hyper, policy: str, steps: int, copies: int | None
) -> dict[str, Any]:
    """Train, and change the live moments with so many bytes of copies at a time.

    Returns:
        The state after the change, the most bytes of fp32 copies that were alive at the same time,
        those of the largest parameter and those of all together.
    """
    run = policies.build(layout, hyper, "{}")
    harness.train(run, steps)
    alive, most, asked = [0], [0], [0]

    def ended(size: int) -> None:
        alive[0] -= size

    sizes = []
    for member in members_of(run.optimizer):
        inner = member.optimizer
        original = inner.get_unscaled_state
        sizes += [4 * state["exp_avg"].numel() for state in inner.state.values()]

        def counted(*args: Any, original: Any = original) -> torch.Tensor:
            out = original(*args)
            size = out.numel() * out.element_size()
            weakref.finalize(out, ended, size)
            alive[0] += size
            asked[0] += size
            most[0] = max(most[0], alive[0])
            return out

        inner.get_unscaled_state = counted
    with (
        mock.patch.object(moments, "COPIES", moments.COPIES if copies is None else copies),
        mock.patch.object(quantiles, "BATCH", quantiles.BATCH if copies is None else copies),
    ):
        megatron_ext.transform_moments(run.optimizer, yaml_file.loads(policy))
    found = {"most": most[0], "largest": 2 * max(sizes), "all": asked[0]}
    for member in members_of(run.optimizer):
        del member.optimizer.get_unscaled_state
    return {**found, "state": gather(run)}


def bad_range(layout: Layout, hyper: Hyper) -> dict[str, Any]:
    """Change two parameters, the second by ranges that overlap, each in a batch of its own."""
    run = policies.build(layout, hyper, "{}")
    harness.train(run, 1)
    inner = members_of(run.optimizer)[0].optimizer
    one, two = list(inner.state)[:2]
    before = inner.get_unscaled_state(one, "exp_avg").clone()

    def rule(begin: int, end: int) -> RangeRule:
        return RangeRule(begin, end, Fill(0.5), Fill(0.5), WHOLE)

    shards = [
        MomentShard("one", inner, one, (rule(0, 4),)),
        MomentShard("two", inner, two, (rule(0, 5), rule(3, 9))),
    ]
    error = ""
    with mock.patch.object(moments, "COPIES", 1):
        try:
            moments.transform(shards)
        except RuntimeError as e:
            error = str(e)
    after = inner.get_unscaled_state(one, "exp_avg")
    return {"error": error, "unchanged": bool(torch.equal(before, after))}


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
