"""Phases of every optimizer with stock Megatron, whose state is corrected by hand.

Runs where this package cannot be imported, and does not know its table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from . import harness
from .harness import Hyper, Layout

#: Class -> its moments by order, as they stand in its source.
FIRST = {
    "FusedAdamStandIn": "exp_avg",
    "AdamW": "exp_avg",
    "SOAP": "exp_avg",
    "Lion": "exp_avg",
    "SGD": "momentum_buffer",
    "LaProp": "exp_avg",
    "REKLS": "exp_avg",
    "TensorParallelMuon": "momentum_buffer",
}
SECOND = dict.fromkeys(("FusedAdamStandIn", "AdamW", "SOAP", "LaProp", "REKLS"), "exp_avg_sq")
BEFORE, AFTER = 3, 2


def expected(
    layout: Layout, first: Hyper, second: Hyper, directory: str, changes: list[str]
) -> dict[str, Any]:
    """Train, save, and go on with the second phase's values and each change by hand.

    Each time the first phase is trained anew: nothing is loaded, which stock cannot do for SGD.
    """
    run = harness.build(layout, first)
    harness.train(run, BEFORE)
    harness.save(run, directory)
    out: dict[str, Any] = {"saved": state_of(run)}
    for change in changes:
        run = harness.build(layout, first)
        harness.train(run, BEFORE)
        now = corrected(run, second, change)
        loaded = state_of(run)
        run.losses = []
        run.hyper = replace(run.hyper, loss_factor=now.loss_factor)
        harness.train(run, AFTER)
        out[change] = {"loaded": loaded, "final": state_of(run), "losses": run.losses}
    return out


def corrected(run: harness.Run, second: Hyper, change: str) -> Hyper:
    """Give a run the second phase's hyperparameters, and make the change."""
    for inner in harness.inner_optimizers(run.optimizer):
        for group in inner.param_groups:
            group["max_lr"], group["min_lr"] = second.lr, second.min_lr
            if change == "gradient-scale" and "eps" in group:
                group["eps"] *= 2.0
    run.scheduler = harness.scheduler_for(run, second)
    with torch.no_grad():
        for inner in harness.inner_optimizers(run.optimizer):
            _CHANGES[change](inner)
    return second


def moments_of(inner: Any) -> list[tuple[int, torch.Tensor]]:
    """The order of each moment of a torch optimizer, and its tensor."""
    name = type(inner).__name__
    return [
        (order, state[key])
        for order, table in ((1, FIRST), (2, SECOND))
        if (key := table.get(name)) is not None
        for state in inner.state.values()
        if state.get(key) is not None
    ]


def _keep(inner: Any) -> None:
    assert moments_of(inner) or not inner.param_groups[0]["momentum"]


def _reset(inner: Any) -> None:
    for _, x in moments_of(inner):
        x.zero_()
    for holder in (*inner.param_groups, *inner.state.values()):
        if "step" in holder:
            holder["step"] = holder["step"] * 0


def _scale(inner: Any) -> None:
    for order, x in moments_of(inner):
        if order == 1:
            x.mul_(0.5)


def _prune(inner: Any) -> None:
    for order, x in moments_of(inner):
        if order == 1:
            size = x.abs().float().numpy().ravel()
            x.masked_fill_(x.abs() <= float(np.quantile(size, 0.5, method="lower")), 0.0)


def _gradient_scale(inner: Any) -> None:
    for order, x in moments_of(inner):
        x.mul_(2.0**order)


_CHANGES: dict[str, Callable[[Any], None]] = {
    "keep": _keep,
    "reset": _reset,
    "scale": _scale,
    "prune": _prune,
    "gradient-scale": _gradient_scale,
}


def state_of(run: harness.Run) -> list[dict[str, Any]]:
    """This rank's whole state: for each parameter its master weights, every tensor, the step."""
    found = []
    for inner in harness.inner_optimizers(run.optimizer):
        for group in inner.param_groups:
            steps = {"step": group["step"]} if "step" in group and group["params"] else {}
            for param in group["params"]:
                held = {"param": param, **inner.state.get(param, {}), **steps}
                found.append(
                    {"class": type(inner).__name__, **{k: _plain(v) for k, v in held.items()}}
                )
    return found


def _plain(value: Any) -> Any:
    return value.detach().float().numpy().copy() if isinstance(value, torch.Tensor) else value
