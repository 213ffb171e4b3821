"""Resumes that have to be refused, with the fault on one rank only."""

from __future__ import annotations

import copy
import traceback
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.policy import request, yaml_file
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.resume import optimizer
from megatron_ext.resume.members import members_of

from . import harness, subject
from .harness import Hyper, Layout


def on_one_rank(
    fault: str, layout: Layout, hyper: Hyper, directory: str, faulty: int = 1
) -> dict[str, Any]:
    """Load with `fault` on rank `faulty`; what this rank raised and whether it changed anything."""
    run = subject.build(layout, hyper)
    members = members_of(run.optimizer)
    before = harness.snapshot(run)["groups"]
    if dist.get_rank() == faulty:
        _FAULTS[fault](members[0])
    try:
        harness.load(run, directory)
    except Exception as e:
        after = harness.snapshot_groups(run)
        return {
            "type": type(e).__name__,
            "message": str(e),
            "unchanged": before == after,
            "collectives_work": _collectives_work(),
        }
    return {"type": "", "message": "", "unchanged": False, "collectives_work": True}


def in_files(
    layout: Layout, hyper: Hyper, directories: list[str], verify: bool = False
) -> dict[str, Any]:
    """Load what this rank finds in its own directory; what it raised, and about its groups."""
    run = subject.build(layout, hyper, verify=verify)
    before = harness.snapshot_groups(run)
    try:
        harness.load(run, directories[dist.get_rank()])
    except Exception as e:
        return {
            "type": type(e).__name__,
            "message": str(e),
            "unchanged": harness.snapshot_groups(run) == before,
            "collectives_work": _collectives_work(),
        }
    return {"type": "", "message": "", "unchanged": False, "collectives_work": True}


def _collectives_work() -> bool:
    """Whether the ranks are still in step with each other after the error."""
    total = torch.ones(1)
    dist.all_reduce(total)
    return int(total) == dist.get_world_size()


def _unknown_key(member: Any) -> None:
    member.resume.policy = ResumePolicy(keep_hyperparameters=("momentum_of_inertia",))


def _other_policy(member: Any) -> None:
    member.resume.policy = ResumePolicy(keep_hyperparameters=("eps",))


def _damaged_groups(member: Any) -> None:
    _tamper(member, lambda section: section["param_groups"][0].update(step=999))


def _no_groups(member: Any) -> None:
    _tamper(member, lambda section: section.pop("param_groups"))


def _tamper(member: Any, change: Any) -> None:
    original = member._agreed_plan

    def tampered(state_dict: Any) -> Any:
        state_dict = {**state_dict, "optimizer": copy.deepcopy(state_dict["optimizer"])}
        change(state_dict["optimizer"])
        return original(state_dict)

    member._agreed_plan = tampered


def _unreadable_file(member: Any) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(5, "Input/output error")

    original = optimizer.SelectiveAdam.load_parameter_state

    def load(filename: str, **kwargs: Any) -> None:
        stock, torch.load = torch.load, fail
        try:
            original(member, filename, **kwargs)
        finally:
            torch.load = stock

    member.load_parameter_state = load


_FAULTS = {
    "unknown-key": _unknown_key,
    "other-policy": _other_policy,
    "damaged-groups": _damaged_groups,
    "no-groups": _no_groups,
    "unreadable-file": _unreadable_file,
}


def keeps(layout: Layout, hyper: Hyper, directory: str, policy: dict[str, Any]) -> tuple[str, str]:
    """The error of a resume with this policy, or empty strings."""
    run = subject.build(layout, hyper, policy)
    try:
        harness.load(run, directory)
    except Exception as e:
        return type(e).__name__, str(e)
    return "", ""


def resume_other_model(layout: Layout, hyper: Hyper, directory: str) -> dict[str, str]:
    """Load into a model of another size."""
    run = subject.build(layout, hyper)
    try:
        harness.load(run, directory)
    except Exception as e:
        return {"type": type(e).__name__, "message": str(e), "trace": traceback.format_exc()}
    return {"type": "", "message": ""}


def build_error(layout: Layout, hyper: Hyper, **config: Any) -> tuple[str, str]:
    """The error of building an optimizer with these OptimizerConfig values changed."""
    import megatron_ext

    def get_optimizer(stock_config: Any, model: Any, **kwargs: Any) -> Any:
        arguments = dict(config)
        optimizer_class = arguments.pop("optimizer_class", request.DEFAULT_CLASS)
        policy = yaml_file.loads(arguments.pop("policy", "{}"))
        if arguments.pop("use_megatron_fsdp", False):
            for chunk in model:
                chunk.ddp_config.use_megatron_fsdp = True
        for key, value in arguments.items():
            setattr(stock_config, key, value)
        return megatron_ext.get_megatron_optimizer(
            stock_config, model, optimizer_class=optimizer_class, policy=policy, **kwargs
        )

    try:
        harness.build(layout, hyper, get_optimizer)
    except Exception as e:
        return type(e).__name__, str(e)
    return "", ""
