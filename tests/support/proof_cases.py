"""Resumes in which one bit of one element is another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.resume.members import members_of

from . import harness, subject
from .harness import Hyper, Layout


def flipped(layout: Layout, hyper: Hyper, directory: str, what: str) -> dict[str, str]:
    """The error if one bit of one element is flipped between the file and the optimizer.

    Args:
        layout: The run's layout, on one rank.
        hyper: Its hyperparameters.
        directory: A checkpoint.
        what: ``master``, ``weight`` or ``exp_avg``. The bit is one that a bf16 value has. With a
            number all master weights of the parameter are that.
    """
    run = subject.build(layout, hyper)
    (member,) = members_of(run.optimizer)

    def flip(model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        if what.isdigit():
            tensors["param"].fill_(float(what))
            return
        target = {"master": tensors["param"], "weight": model_param.data}.get(what)
        target = tensors[what] if target is None else target
        bits = target.view(-1)[5:6].view(torch.int16 if target.itemsize == 2 else torch.int32)
        bits ^= 1 << (0 if target.itemsize == 2 else 16)

    seen = _at_the_third(member, flip)
    try:
        harness.load(run, directory)
    except Exception as e:
        return {"type": type(e).__name__, "message": str(e)}
    assert len(seen) > 3
    return {"type": "", "message": ""}


def _at_the_third(
    member: Any, change: Callable[[torch.Tensor, dict[str, Any]], None]
) -> list[torch.Tensor]:
    """Let a load change the third parameter's tensors; returns those that it has written."""
    original = member._set_main_param_and_optimizer_states
    seen: list[torch.Tensor] = []

    def write(model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        seen.append(model_param)
        if len(seen) == 3:
            change(model_param, tensors)
        original(model_param, tensors)

    member._set_main_param_and_optimizer_states = write
    return seen


def judged(layout: Layout, hyper: Hyper, directory: str, what: str) -> dict[str, Any]:
    """The error of a load and one step, if rank 0 loads something wrong; and what was proven.

    Args:
        layout: The run's layout.
        hyper: Its hyperparameters.
        directory: A checkpoint.
        what: ``right``; ``foreign``, where the third parameter's master weights are in the order of
            another; ``negative``, with such an element of its exp_avg_sq; ``moment``, where exp_avg
            is another one after the load.
    """
    run = subject.build(layout, hyper)
    (member,) = members_of(run.optimizer)

    def spoil(_: torch.Tensor, tensors: dict[str, Any]) -> None:
        if dist.get_rank() == 0:
            if what == "foreign":
                tensors["param"].copy_(tensors["param"].flip(0))
            elif what == "negative":
                tensors["exp_avg_sq"].view(-1)[0] = -tensors["exp_avg_sq"].max()

    seen = _at_the_third(member, spoil)
    where = "load"
    try:
        harness.load(run, directory)
        where = "step"
        if what == "moment":  # on every rank: the guard has no collective
            _change(member.optimizer)
        harness.train(run, 1)
    except Exception as e:
        return {"type": type(e).__name__, "message": str(e), "where": where}
    assert len(seen) > 3
    loaded = member.resume.report.optimizers[0].loaded
    return {
        "type": "",
        "where": where,
        "proven": loaded.proven,
        "elements": loaded.elements["param"],
        "checked": member.moments_checked,
        "lines": member.resume.report.lines(),
    }


@torch.no_grad()
def _change(inner: Any) -> None:
    for param, state in inner.state.items():
        if hasattr(inner, "set_scaled_state"):
            changed = inner.get_unscaled_state(param, "exp_avg").float() * 100
            inner.set_scaled_state(param, "exp_avg", changed)
        else:
            state["exp_avg"].mul_(100)


class _Waits(TorchDispatchMode):
    """Counts how often the host needs a number that a device has."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def waits(layout: Layout, hyper: Hyper, directory: str) -> tuple[int, int]:
    """Number of parameters that a load writes, and how often it waits for a device meanwhile."""
    run = subject.build(layout, hyper)
    (member,) = members_of(run.optimizer)
    original = member._set_main_param_and_optimizer_states
    waits, written = _Waits(), 0

    def write(model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        nonlocal written
        written += 1
        with waits:
            original(model_param, tensors)

    member._set_main_param_and_optimizer_states = write
    harness.load(run, directory)
    return written, waits.count
