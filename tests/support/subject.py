"""The same runs with this package: what the oracle is compared with."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

import megatron_ext
from megatron_ext.resume.members import members_of

from . import harness
from .harness import Hyper, Layout


def resume(
    layout: Layout,
    hyper: Hyper,
    directory: str,
    more: int,
    *,
    policy: dict[str, Any] | None = None,
    override: bool = False,
    use_checkpoint: bool = False,
    save_to: str | None = None,
    report_dir: str | None = None,
) -> dict[str, Any]:
    """Build with this package, load, train; the loaded state, the losses and the report."""
    run = build(layout, hyper, policy, override, use_checkpoint, report_dir)
    harness.load(run, directory)
    loaded = harness.snapshot(run)
    harness.train(run, more)
    if save_to is not None:
        harness.save(run, save_to)
    members = members_of(run.optimizer)
    report = members[0].resume.report
    return {
        "losses": run.losses,
        "lrs": run.lrs,
        "wds": run.wds,
        "loaded": loaded,
        "final": harness.snapshot(run),
        "members": [type(m).__name__ for m in members],
        "report": report.to_json() if report else None,
        "lines": report.lines() if report else [],
    }


def build(
    layout: Layout,
    hyper: Hyper,
    policy: dict[str, Any] | None = None,
    override: bool = False,
    use_checkpoint: bool = False,
    report_dir: str | None = None,
    verify: bool = False,
) -> harness.Run:
    """A run whose optimizer this package builds."""
    get_optimizer = functools.partial(
        megatron_ext.get_megatron_optimizer,
        policy=megatron_ext.ResumePolicy(**(policy or {})),
        report_dir=report_dir,
        verify=verify,
    )
    return harness.build(
        layout, hyper, get_optimizer, override=override, use_checkpoint=use_checkpoint
    )


def load_twice(layout: Layout, hyper: Hyper, directory: str) -> dict[str, Any]:
    """Load, train, load again into the same optimizer."""
    run = build(layout, hyper)
    harness.load(run, directory)
    harness.train(run, 1)
    harness.load(run, directory, scheduler=False)
    return harness.snapshot(run)


def count_collectives(layout: Layout, hyper: Hyper, directory: str) -> dict[str, Any]:
    """Bytes of the reductions a load adds; number of reductions of a step, ours and stock's."""
    import torch.distributed as dist

    reductions: list[tuple[str, int]] = []
    original = dist.all_reduce

    def counting(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals["__name__"]
        reductions.append((caller, tensor.numel() * tensor.element_size()))
        return original(tensor, *args, **kwargs)

    counts: dict[str, Any] = {}
    dist.all_reduce = torch.distributed.all_reduce = counting
    try:
        run = build(layout, hyper)
        harness.load(run, directory)
        counts["load"] = [n for caller, n in reductions if caller.startswith("megatron_ext")]
        reductions.clear()
        harness.train(run, 1)
        counts["step"] = len(reductions)
        run = harness.build(layout, hyper)
        reductions.clear()
        harness.train(run, 1)
        counts["stock step"] = len(reductions)
    finally:
        dist.all_reduce = torch.distributed.all_reduce = original
    return counts
