"""Phases on real ranks: begun, saved, loaded again with the same policy."""

from __future__ import annotations

from typing import Any

from megatron_ext.resume import members

from . import harness
from .harness import Hyper, Layout
from .policies import build
from .unsharded import gather


def _phase(run: harness.Run) -> dict[str, Any]:
    report = members.members_of(run.optimizer)[0].resume.report
    return {
        "phase": report.to_json()["phase"],
        "step": [o.plan.step for o in report.optimizers],
        "scales": [o.loss_scale for o in report.optimizers],
        "lines": report.lines(),
        "marks": sorted(
            {g.get("megatron_ext_phase") for i in _inner(run) for g in i.param_groups}, key=str
        ),
    }


def _inner(run: harness.Run) -> list[Any]:
    return harness.inner_optimizers(run.optimizer)


def begun_and_restarted(
    layout: Layout, hyper: Hyper, directory: str, policies: dict[str, str], target: str, steps: int
) -> dict[str, dict[str, Any]]:
    """For each policy: begin, save in the middle, go on; and load what was saved and go on."""
    out = {}
    for number, (name, policy) in enumerate(policies.items()):
        whole = build(layout, hyper, policy)
        harness.load(whole, directory)
        begun = _phase(whole)
        harness.train(whole, steps)
        harness.save(whole, f"{target}-{number}")
        harness.train(whole, steps)
        again = build(layout, hyper, policy)
        harness.load(again, f"{target}-{number}")
        restarted = _phase(again)
        harness.train(again, steps)
        out[name] = {
            "begun": begun,
            "restarted": restarted,
            "whole": _end(whole, steps),
            "again": _end(again, steps),
        }
    return out


def saved_by_one_policy(
    layout: Layout, hyper: Hyper, directory: str, policy: str, target: str, steps: int
) -> None:
    """Begin a phase, train and save."""
    run = build(layout, hyper, policy)
    harness.load(run, directory)
    harness.train(run, steps)
    harness.save(run, target)


def loaded(
    layout: Layout, hyper: Hyper, directory: str, policies: list[str]
) -> list[dict[str, Any]]:
    """What each policy makes of a checkpoint: the phase, the schedule's position, or the error."""
    out = []
    for policy in policies:
        run = build(layout, hyper, policy)
        try:
            harness.load(run, directory)
        except Exception as e:
            out.append({"type": type(e).__name__, "message": str(e)})
            continue
        out.append(
            {
                **_phase(run),
                "num_steps": run.scheduler.num_steps,
                "lr": harness.snapshot_groups(run)[0]["lr"],
                "loss_scale": [
                    float(o.get_loss_scale()) for o in members.members_of(run.optimizer)
                ],
            }
        )
    return out


def _end(run: harness.Run, steps: int) -> dict[str, Any]:
    return {
        "state": gather(run),
        "losses": run.losses[-steps:],
        "lrs": run.lrs[-steps:],
        "steps": harness.snapshot(run)["steps"],
        "num_steps": run.scheduler.num_steps,
    }
