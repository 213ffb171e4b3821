"""A stand-in for Muon, so that Megatron's own chain of Muon and Adam can be built without the
emerging-optimizers package: momentum whose step is normalised, for matrices."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch


class MuonStandIn(torch.optim.Optimizer):
    """Keeps ``momentum_buffer`` where Muon keeps it, and no betas in its groups."""

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _init_group(self, group: dict[str, Any], skip_non_grad_params: bool = True) -> None:
        for param in group["params"]:
            if skip_non_grad_params and param.grad is None:
                continue
            if not self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self._init_group(group)
            for param in group["params"]:
                if param.grad is None:
                    continue
                buffer = self.state[param]["momentum_buffer"]
                buffer.lerp_(param.grad, 1 - group["momentum"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(buffer / (buffer.norm() + 1e-12), alpha=group["lr"])


def install() -> None:
    """Let Megatron take the stand-in for Muon."""
    core = importlib.import_module("megatron.core.optimizer")
    emerging = importlib.import_module("megatron.core.optimizer.emerging_optimizers")
    core.HAVE_EMERGING_OPTIMIZERS = emerging.HAVE_EMERGING_OPTIMIZERS = True
    registry = emerging._EMERGING_OPTIMIZERS
    registry["muon"] = dataclasses.replace(
        registry["muon"],
        optimizer_cls=MuonStandIn,
        config_to_kwargs=lambda config, *_: {
            "lr": config.lr,
            "momentum": 0.9,
            "weight_decay": config.weight_decay,
        },
    )


def momenta(optimizer: Any) -> list[Any]:
    """This rank's momentum buffers."""
    return [
        state["momentum_buffer"].detach().clone().numpy()
        for one in optimizer.chained_optimizers
        for state in one.optimizer.state.values()
        if "momentum_buffer" in state
    ]
