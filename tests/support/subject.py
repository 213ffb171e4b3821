"""The same runs with this package: what the oracle is compared with."""

from __future__ import annotations

import functools
from typing import Any

import megatron_ext
from megatron_ext import host

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
    members = host.members_of(run.optimizer)
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
) -> harness.Run:
    """A run whose optimizer this package builds."""
    get_optimizer = functools.partial(
        megatron_ext.get_megatron_optimizer,
        policy=megatron_ext.ResumePolicy(**(policy or {})),
        report_dir=report_dir,
    )
    return harness.build(
        layout, hyper, get_optimizer, override=override, use_checkpoint=use_checkpoint
    )


def train_and_save(layout: Layout, hyper: Hyper, steps: int, directory: str) -> dict[str, Any]:
    """Phase 1 with this package's class."""
    run = build(layout, hyper)
    harness.train(run, steps)
    harness.save(run, directory)
    return harness.snapshot(run)
