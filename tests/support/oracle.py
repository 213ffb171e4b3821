"""What a resume has to give, computed by stock Megatron with the groups corrected by hand.

This file does not import megatron_ext (`tests/host/test_host.py` checks it), and the processes it
runs in cannot.
"""

from __future__ import annotations

from typing import Any

from . import harness
from .harness import Hyper, Layout


def phase_1(layout: Layout, hyper: Hyper, steps: int, directory: str | None) -> dict[str, Any]:
    """Train with stock Megatron, save, and return what was saved."""
    run = harness.build(layout, hyper)
    harness.train(run, steps)
    if directory is not None:
        harness.save(run, directory)
    return {**harness.snapshot(run), "losses": run.losses, "lrs": run.lrs}


def uninterrupted(
    layout: Layout, first: Hyper, second: Hyper, steps: int, more: int
) -> dict[str, Any]:
    """Train phase 1 and go on with phase 2's hyperparameters in one process, groups edited."""
    run = harness.build(layout, first)
    harness.train(run, steps)
    return second_phase(run, second, more)


def corrected_load(
    layout: Layout, first: Hyper, second: Hyper, directory: str, more: int
) -> dict[str, Any]:
    """Load phase 1 with stock Megatron and its own arguments, then edit the groups by hand."""
    run = harness.build(layout, first)
    harness.load(run, directory)
    return second_phase(run, second, more)


def stock_resume(
    layout: Layout,
    hyper: Hyper,
    directory: str,
    more: int,
    override: bool = True,
    save_to: str | None = None,
    use_checkpoint: bool = False,
) -> dict[str, Any]:
    """Resume with stock Megatron, nothing corrected."""
    run = harness.build(layout, hyper, override=override, use_checkpoint=use_checkpoint)
    harness.load(run, directory)
    loaded = harness.snapshot(run)
    harness.train(run, more)
    if save_to is not None:
        harness.save(run, save_to)
    return {**_result(run), "loaded": loaded}


def stock_error(layout: Layout, hyper: Hyper, directory: str) -> tuple[str, str]:
    """How stock Megatron fails to resume: the exception's type and message; ("", "") if not."""
    try:
        stock_resume(layout, hyper, directory, more=1)
    except Exception as e:
        return type(e).__name__, str(e)
    return "", ""


def importable(name: str) -> bool:
    """Whether a module can be imported in this process."""
    import importlib

    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def second_phase(run: harness.Run, second: Hyper, more: int) -> dict[str, Any]:
    for inner in harness.inner_optimizers(run.optimizer):
        for group in inner.param_groups:
            _edit(group, run.hyper, second)
    run.scheduler = harness.scheduler_for(run, second)
    run.losses, run.lrs, run.wds = [], [], []
    loaded = harness.snapshot(run)
    harness.train(run, more)
    return {**_result(run), "loaded": loaded}


def _edit(group: dict[str, Any], first: Hyper, second: Hyper) -> None:
    decoupled = first.decoupled_lr is not None and group["max_lr"] == first.decoupled_lr
    extra = first.extra_group and group["max_lr"] == first.lr / 2
    group["max_lr"], group["min_lr"] = second.lr, second.min_lr
    if extra:
        group["max_lr"], group["min_lr"] = second.lr / 2, second.min_lr / 2
    if decoupled:
        group["max_lr"] = second.decoupled_lr
        if second.decoupled_min_lr is not None:
            group["min_lr"] = second.decoupled_min_lr
    group["betas"], group["eps"] = second.betas, second.eps


def _result(run: harness.Run) -> dict[str, Any]:
    return {
        "losses": run.losses,
        "lrs": run.lrs,
        "wds": run.wds,
        "final": harness.snapshot(run),
    }
