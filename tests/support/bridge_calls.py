"""Calls on a rank that do not train: of `resume_with`, and of commands."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch

from .bridge_runs import Bridge, config


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        run: What the config is made of.
        resume: The arguments.
        energon: Whether the dataset is an Energon one.
        then: Arguments of a second call with another config.
    """

    run: Bridge
    resume: dict[str, Any] = field(default_factory=dict)
    energon: bool = False
    then: dict[str, Any] | None = None


def call(case: Case) -> dict[str, Any]:
    """Make the call; what it raised, and whether config and process were left as they were."""
    from megatron_ext import bridge
    from megatron_ext.resume.session import current

    cfg = config(case.run)
    if case.energon:
        name = "megatron.bridge.training.config"
        cfg.dataset = object.__new__(importlib.import_module(name).EnergonDatasetConfig)
    if case.then is not None:
        bridge.resume_with(config(case.run), **case.resume)
    before, launched = copy.copy(vars(cfg.checkpoint)), current.launched
    try:
        bridge.resume_with(cfg, **(case.resume if case.then is None else case.then))
    except Exception as e:
        unchanged = vars(cfg.checkpoint) == before and current.launched is launched
        return {"type": type(e).__name__, "message": str(e), "unchanged": unchanged}
    return {"type": "", "message": "", "unchanged": False}


def calls(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """Make each call; all but the last must leave the process as it was."""
    return {name: call(case) for name, case in cases.items()}


def prepared(run: Bridge, resume: dict[str, Any]) -> dict[str, Any]:
    """The section `checkpoint` of a config that `resume_with` has prepared, and the request."""
    from megatron_ext import bridge
    from megatron_ext.resume.session import current

    cfg = config(run)
    bridge.resume_with(cfg, **resume)
    return {
        **{name: getattr(cfg.checkpoint, name) for name in ("load", "save", "ckpt_step")},
        "request": current.launched,
    }


def stock_optimizer(model_chunks: Any, config_overrides: Any, **kwargs: Any) -> Any:
    """Build an optimizer as a recipe's own `provide` may, past every wrapper."""
    core = importlib.import_module("megatron.core.optimizer")
    name = "_get_megatron_optimizer_based_on_param_groups"
    setattr(core, name, getattr(core, name).__megatron_ext_original__)
    kinds = {"bf16": True, "params_dtype": torch.bfloat16, "use_distributed_optimizer": True}
    config = core.OptimizerConfig(optimizer="adam", lr=1e-3, min_lr=1e-4, **kinds)
    return core.get_megatron_optimizer(config, model_chunks, config_overrides, **kwargs)


def without(removed: list[tuple[str, str]]) -> list[str]:
    """Take names out of Bridge, as an older version lacks them; what `resume_with` says to each.

    Args:
        removed: Module and dotted attribute.
    """
    messages = []
    for module, attribute in removed:
        owner: Any = importlib.import_module(module)
        *owners, last = attribute.split(".")
        for part in owners:
            owner = getattr(owner, part)
        found = getattr(owner, last)
        delattr(owner, last)
        messages.append(call(Case(Bridge(1)))["message"])
        setattr(owner, last, found)
    return messages


def command(argv: list[str]) -> tuple[int, str]:
    """Run ``python -m megatron_ext`` in this process; its status and what it printed."""
    from megatron_ext import cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = cli.main(argv)
    return status, out.getvalue()


def warned(version: str) -> list[str]:
    """What `resume_with` warns of where Bridge has this version."""
    from megatron_ext import bridge

    found = importlib.import_module("megatron.bridge")
    found.__version__ = version  # type: ignore[attr-defined]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bridge.resume_with(config(Bridge(1)))
    return [str(w.message) for w in caught if "megatron_ext" in str(w.message)]


def lines(code: str, directory: str, run: Bridge) -> str:
    """Run the lines of a page in a directory; what they print."""
    out = io.StringIO()
    with contextlib.chdir(directory), contextlib.redirect_stdout(out):
        exec(code, {"config_of_the_run": lambda: config(run)})
    return out.getvalue()
