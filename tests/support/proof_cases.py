"""Resumes in which one bit of one element is another one."""

from __future__ import annotations

from typing import Any

import torch

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
    original = member._set_main_param_and_optimizer_states
    seen = 0

    def write(model_param: torch.Tensor, tensors: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if seen == 3 and what.isdigit():
            tensors["param"].fill_(float(what))
        elif seen == 3:
            target = {"master": tensors["param"], "weight": model_param.data}.get(what)
            target = tensors[what] if target is None else target
            bits = target.view(-1)[5:6].view(torch.int16 if target.itemsize == 2 else torch.int32)
            bits ^= 1 << (0 if target.itemsize == 2 else 16)
        original(model_param, tensors)

    member._set_main_param_and_optimizer_states = write
    try:
        harness.load(run, directory)
    except Exception as e:
        return {"type": type(e).__name__, "message": str(e)}
    assert seen > 3
    return {"type": "", "message": ""}
