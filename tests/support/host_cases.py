"""What `megatron_ext.host` does to the imported Megatron, seen from inside a rank process."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace
from typing import Any

from packaging.version import Version

from megatron_ext.cli import env
from megatron_ext.errors import HostError
from megatron_ext.hooks import installing
from megatron_ext.host import contract as names
from megatron_ext.host.contract import CONTRACT, HostName, check_contract, megatron_version
from megatron_ext.resume import members

from . import harness
from .harness import Hyper, Layout


def contract() -> dict[str, Any]:
    """The contract against the installed Megatron, and what is rebound after `install`."""
    check_contract()
    installing.install()
    installing.install()
    rebound, layers = [], []
    for name in CONTRACT:
        target = _find(name)
        if target is not None:
            original = getattr(target, "__megatron_ext_original__", None)
            if original is not None:
                rebound.append((name.module, name.attribute))
                layers.append(hasattr(original, "__megatron_ext_original__"))
    return {"version": megatron_version(), "rebound": rebound, "rebound twice": any(layers)}


def _find(name: HostName) -> Any:
    try:
        target: Any = importlib.import_module(name.module)
        for part in name.attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError):
        return None
    return target


def broken_contract(moved: list[tuple[str, str, tuple[str, ...]]]) -> str:
    """The error when upstream has moved these names."""
    before = names.CONTRACT
    names.CONTRACT = (*before, *(HostName(m, a, p, reference="a test") for m, a, p in moved))
    try:
        check_contract()
    except HostError as e:
        return str(e)
    finally:
        names.CONTRACT = before
    return ""


def version_warnings(version: str) -> list[str]:
    """The warnings of two checks with a Megatron of this version."""
    stock, found = names.megatron.find, names.megatron.find()
    names.megatron.find = lambda: replace(found, version=Version(version))
    names._warn_if_untested.cache_clear()
    # Only the version is another; the names of the installed one need not be those of that.
    contract, names.CONTRACT = names.CONTRACT, ()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check_contract()
            check_contract()
        return [str(w.message) for w in caught]
    finally:
        names.megatron.find = stock
        names.CONTRACT = contract
        names._warn_if_untested.cache_clear()


def stock_after_install() -> dict[str, Any]:
    """A stock build, step and scheduler load where Megatron has been prepared but not asked."""
    installing.install()
    run = harness.build(Layout(), Hyper())
    harness.train(run, 1)
    core = importlib.import_module("megatron.core.optimizer")
    return {
        "types": [type(o).__name__ for o in run.optimizer.chained_optimizers],
        "module": type(run.optimizer.chained_optimizers[0]).__module__,
        "global": core.DistributedOptimizer.__module__,
        "members": len(members.members_of(run.optimizer)),
    }


def environment(moved: list[tuple[str, str, tuple[str, ...]]]) -> dict[str, Any]:
    """What the command env finds where upstream has moved these names, without the CPU's GPU."""
    import torch

    before, count = names.CONTRACT, torch.cuda.device_count
    names.CONTRACT = (*before, *(HostName(m, a, p, reference="a test") for m, a, p in moved))
    torch.cuda.device_count = lambda: 0
    try:
        return env.environment()
    finally:
        names.CONTRACT, torch.cuda.device_count = before, count
