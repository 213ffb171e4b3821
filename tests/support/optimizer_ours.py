"""The second phases of `optimizer_stock`, as resumes with this package."""

from __future__ import annotations

from typing import Any

import megatron_ext
from megatron_ext.policy import yaml_file
from megatron_ext.resume.members import members_of

from . import harness, optimizer_stock, policies
from .harness import Hyper, Layout


def resumed(layout: Layout, second: Hyper, directory: str, asked: dict[str, str]) -> dict[str, Any]:
    """For each policy: the state after the load and two steps later, the losses, the report."""
    out: dict[str, Any] = {}
    for name, policy in asked.items():
        run = policies.build(layout, second, policy)
        harness.load(run, directory)
        loaded = optimizer_stock.state_of(run)
        harness.train(run, optimizer_stock.AFTER)
        members = members_of(run.optimizer)
        out[name] = {
            "loaded": loaded,
            "final": optimizer_stock.state_of(run),
            "losses": run.losses,
            "checked": [member.moments_checked for member in members],
            "lines": members[0].resume.report.lines(),
            "report": members[0].resume.report.to_json(),
        }
    return out


def transformed(layout: Layout, hyper: Hyper, directory: str, policy: str) -> list[dict[str, Any]]:
    """The state after a change of the running optimizer."""
    run = policies.build(layout, hyper, "{}")
    harness.load(run, directory)
    megatron_ext.transform_moments(run.optimizer, yaml_file.loads(policy))
    return optimizer_stock.state_of(run)


def tampered(layout: Layout, hyper: Hyper, directory: str) -> tuple[str, str]:
    """What the guard says of first moments that are changed after the load."""
    run = policies.build(layout, hyper, "{}")
    harness.load(run, directory)
    inner = harness.inner_optimizers(run.optimizer)[0]
    for order, moment in optimizer_stock.moments_of(inner):
        moment.mul_(100.0 if order == 1 else 1.0)
    try:
        harness.train(run, 1)
    except Exception as e:
        return type(e).__name__, str(e)
    return "", ""


def unknown(layout: Layout, hyper: Hyper) -> tuple[str, str]:
    """The error for an optimizer that a script has added to Megatron's registry."""
    import torch
    from megatron.core.optimizer import emerging_optimizers

    class Unknown(torch.optim.Adagrad):
        pass

    entry = emerging_optimizers.EmergingOptimizerEntry(
        Unknown, config_to_kwargs=lambda config, *_: {"lr": config.lr}
    )
    emerging_optimizers._EMERGING_OPTIMIZERS["unknown"] = entry
    try:
        policies.build(layout, hyper, "{}")
    except Exception as e:
        return type(e).__name__, str(e)
    finally:
        del emerging_optimizers._EMERGING_OPTIMIZERS["unknown"]
    return "", ""
