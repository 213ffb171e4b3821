"""Resumes of a changed model."""

from __future__ import annotations

import contextlib
from typing import Any

from megatron_ext.policy.counters import Counters
from megatron_ext.resume.members import members_of

from . import harness, policies
from .harness import Hyper, Layout
from .mapped_stock import result


def resumed(
    layout: Layout,
    hyper: Hyper,
    directory: str,
    policy: str,
    more: int,
    save_to: str | None = None,
    iteration: int | None = None,
) -> dict[str, Any]:
    """What is loaded, what the next steps make of it, and what the log says; or the error.

    Args:
        layout: The layout.
        hyper: The hyperparameters.
        directory: The checkpoint.
        policy: The policy, JSON.
        more: Number of steps.
        save_to: Where the result is saved.
        iteration: The checkpoint's, as Megatron's loop would tell it.
    """
    run = policies.build(layout, hyper, policy)
    resume = members_of(run.optimizer)[0].resume
    try:
        with contextlib.nullcontext() if iteration is None else resume.loading() as load:
            if load is not None:
                load.counters = (Counters(iteration, 0), Counters(iteration, 0))
            harness.load(run, directory)
    except Exception as e:
        return {"error": policies._error(e, "load", True)}
    loaded = result(run)
    harness.train(run, more)
    if save_to is not None:
        harness.save(run, save_to)
    report = policies._report(run)
    return {
        "loaded": loaded,
        "final": result(run),
        "losses": run.losses,
        "lines": report.lines(),
        "report": report.to_json(),
    }
