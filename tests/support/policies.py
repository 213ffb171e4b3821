"""Resumes with a policy, and the unsharded state before and after."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

import megatron_ext
from megatron_ext.policy import yaml_file

from . import harness, muon
from .harness import Hyper, Layout
from .unsharded import gather


def build(layout: Layout, hyper: Hyper, policy: str) -> harness.Run:
    """A run of this package with a policy in YAML."""
    get_optimizer = functools.partial(
        megatron_ext.get_megatron_optimizer, policy=yaml_file.loads(policy)
    )
    return harness.build(layout, hyper, get_optimizer)


def resumed(
    layout: Layout, hyper: Hyper, directory: str, policies: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """For each policy, by name: the unsharded state after the load, the step and the report."""
    return {name: _resumed(layout, hyper, directory, text) for name, text in policies.items()}


def _resumed(layout: Layout, hyper: Hyper, directory: str, policy: str) -> dict[str, Any]:
    run = build(layout, hyper, policy)
    harness.load(run, directory)
    return {
        "state": gather(run),
        "held": sum(len(o.state) for o in harness.inner_optimizers(run.optimizer)),
        "steps": harness.snapshot(run)["steps"],
        "groups": harness.snapshot_groups(run),
        "report": _report(run).to_json(),
        "lines": _report(run).lines(),
    }


def transformed(
    layout: Layout, hyper: Hyper, directory: str, policies: dict[str, str], ours: bool
) -> dict[str, dict[str, Any]]:
    """For each policy what `transform_moments` makes of a live optimizer, ours or stock."""
    out = {}
    for name, text in policies.items():
        run = build(layout, hyper, "{}") if ours else harness.build(layout, hyper)
        harness.load(run, directory)
        before = [_address(t) for t in _moments(run)]
        report = megatron_ext.transform_moments(
            run.optimizer, yaml_file.loads(text), model_chunks=None if ours else run.model
        )
        out[name] = {
            "state": gather(run),
            "steps": harness.snapshot(run)["steps"],
            "report": report.to_json(),
            "in place": before == [_address(t) for t in _moments(run)],
        }
    return out


def _moments(run: harness.Run) -> list[torch.Tensor]:
    return [
        state[key]
        for inner in harness.inner_optimizers(run.optimizer)
        for state in inner.state.values()
        for key in ("exp_avg", "exp_avg_sq")
    ]


def _address(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def _report(run: harness.Run) -> Any:
    from megatron_ext.resume import members

    return members.members_of(run.optimizer)[0].resume.report


def trained(
    layout: Layout, hyper: Hyper, directory: str, policy: str, steps: int
) -> dict[str, Any]:
    """Resume with a policy and train: weights, losses, and what the plan said."""
    run = build(layout, hyper, policy)
    harness.load(run, directory)
    harness.train(run, steps)
    return {
        "state": gather(run),
        "losses": run.losses,
        "lrs": run.lrs,
        "groups": harness.snapshot_groups(run),
        "clip_grad": [o.config.clip_grad for o in _members(run)],
        "lines": _report(run).lines(),
    }


def refused(
    layout: Layout, hyper: Hyper, directory: str, policies: list[str]
) -> list[dict[str, Any]]:
    """For each rank's own policy the error of the resume, and whether anything was changed."""
    import torch.distributed as dist

    policy = policies[dist.get_rank() % len(policies)]
    try:
        run = build(layout, hyper, policy)
    except Exception as e:
        return [_error(e, "build", True)]
    before = harness.snapshot(run)
    try:
        harness.load(run, directory)
    except Exception as e:
        after = harness.snapshot(run)
        same = before["groups"] == after["groups"] and before["steps"] == after["steps"]
        return [_error(e, "load", same)]
    return [{"lines": _report(run).lines(), "state": gather(run)}]


def passes(layout: Layout, hyper: Hyper, directory: str, policies: list[str]) -> list[int]:
    """How often a load with each policy goes through the moments on this rank."""
    from megatron_ext import _ops

    calls, original = 0, _ops.Transform.__call__

    def counting(self: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(self, *args)

    found = []
    _ops.Transform.__call__ = counting  # type: ignore[method-assign]
    try:
        for policy in policies:
            run, calls = build(layout, hyper, policy), 0
            harness.load(run, directory)
            found.append(calls)
    finally:
        _ops.Transform.__call__ = original  # type: ignore[method-assign]
    return found


def live_refused(layout: Layout, hyper: Hyper, directory: str, policy: str) -> dict[str, Any]:
    """The error of `transform_moments`."""
    run = build(layout, hyper, "{}")
    harness.load(run, directory)
    try:
        megatron_ext.transform_moments(run.optimizer, yaml_file.loads(policy))
    except Exception as e:
        return _error(e, "live", True)
    return {}


def reductions(layout: Layout, hyper: Hyper, directory: str, policy: str) -> list[str]:
    """The collectives that a load with a policy adds, with the bytes of each reduction."""
    import torch.distributed as dist

    from megatron_ext.base import ranks

    seen: list[str] = []
    reduce, gathered, sent = dist.all_reduce, dist.all_gather_object, dist.broadcast

    def counting(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"] == ranks.__name__:
            seen.append(f"all_reduce {tensor.numel() * tensor.element_size()}")
        return reduce(tensor, *args, **kwargs)

    def gathering(everyone: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"] == ranks.__name__:
            seen.append("gather")
        return gathered(everyone, value, *args, **kwargs)

    def sending(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_globals["__name__"] == ranks.__name__:
            seen.append(f"broadcast {tensor.numel() * tensor.element_size()}")
        return sent(tensor, *args, **kwargs)

    run = build(layout, hyper, policy)
    dist.all_reduce, dist.all_gather_object, dist.broadcast = counting, gathering, sending
    try:
        harness.load(run, directory)
    finally:
        dist.all_reduce, dist.all_gather_object, dist.broadcast = reduce, gathered, sent
    return seen


def chained_with_muon(
    layout: Layout, hyper: Hyper, directory: str, policy: str, target: str
) -> dict[str, Any]:
    """A resume of a chain of Muon and Adam: the Adam part's state, Muon's momenta, the log."""
    run = build(layout, hyper, policy)
    harness.load(run, directory)
    loaded = {"state": gather(run), "momenta": muon.state_beside_adam(run.optimizer)}
    harness.train(run, 1)
    harness.save(run, target)
    return {
        **loaded,
        "lines": _report(run).lines(),
        "groups": harness.snapshot_groups(run),
        "steps": harness.snapshot(run)["steps"],
        "saved": muon.state_beside_adam(run.optimizer),
    }


def _members(run: harness.Run) -> list[Any]:
    from megatron_ext.resume import members

    return members.members_of(run.optimizer)


def _error(e: Exception, where: str, unchanged: bool) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    in_step = int(total) == dist.get_world_size()
    return {
        "type": type(e).__name__,
        "message": str(e),
        "where": where,
        "unchanged": unchanged,
        "in step": in_step,
    }
