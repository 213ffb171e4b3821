"""Resume a Megatron run with other hyperparameters and keep the Adam moments.

Importing this package imports neither torch nor Megatron; its names are loaded on first use.

- `SelectiveAdam`: `DistributedOptimizer` that keeps the moments and takes hyperparameters from the
  arguments.
- `enable`: Enable selective resumes in a host with its own training script.
- `add_arguments`: Add this package's flags; to be passed to Megatron as ``extra_args_provider``.
- `get_megatron_optimizer`: Drop-in for `megatron.core.optimizer.get_megatron_optimizer`.
- `transform_moments`: Apply a policy's moment rules to a live optimizer, between two training
  steps.
- `ResumePolicy`: One decision for every piece of optimizer state at a resume.
- `Preset`: A preset by name.
- `MomentRule`: The rules for the moments of some parameters.
- `GroupRule`: Exceptions for the param_groups with certain attributes.
- `Match`: A pattern for parameters and for their rows.
- `MegatronExtError`: Base class of every error raised by this package.
- `PolicyError`: What the user asked for contradicts itself or names something that cannot be
  decided.
- `PlanError`: The policy cannot be carried out on this checkpoint with these parameter groups.
- `CheckpointError`: The checkpoint lacks the optimizer state that is to be kept, or does not fit
  the model.
- `AgreementError`: The ranks came to different decisions, or another rank refused.
- `HostError`: The installed Megatron, or the way it was launched, is not one this package can
  serve.
- `GuardError`: The first steps after a resume are not those that were planned.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .api import add_arguments, enable, get_megatron_optimizer
    from .errors import (
        AgreementError,
        CheckpointError,
        GuardError,
        HostError,
        MegatronExtError,
        PlanError,
        PolicyError,
    )
    from .policy.match import GroupRule, Match, MomentRule
    from .policy.policy import ResumePolicy
    from .policy.presets import Preset
    from .resume.live import transform_moments
    from .resume.optimizer import SelectiveAdam

_WHERE = {
    "SelectiveAdam": "resume.optimizer",
    "ResumePolicy": "policy.policy",
    "GroupRule": "policy.match",
    "Match": "policy.match",
    "MomentRule": "policy.match",
    "Preset": "policy.presets",
    "transform_moments": "resume.live",
    "get_megatron_optimizer": "api",
    "add_arguments": "api",
    "enable": "api",
    "MegatronExtError": "errors",
    "PolicyError": "errors",
    "PlanError": "errors",
    "CheckpointError": "errors",
    "AgreementError": "errors",
    "HostError": "errors",
    "GuardError": "errors",
}

__all__ = [
    "AgreementError",
    "CheckpointError",
    "GroupRule",
    "GuardError",
    "HostError",
    "Match",
    "MegatronExtError",
    "MomentRule",
    "PlanError",
    "PolicyError",
    "Preset",
    "ResumePolicy",
    "SelectiveAdam",
    "__version__",
    "add_arguments",
    "enable",
    "get_megatron_optimizer",
    "transform_moments",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _WHERE[name].startswith("resume."):  # its modules import Megatron
        importlib.import_module(".host.contract", __name__).require_megatron()
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    # ``help`` asks for every name that inspect lists, and would import torch and Megatron.
    if sys._getframe(1).f_globals.get("__name__") == "inspect":
        return sorted(name for name in __all__ if name not in _WHERE)
    return sorted(__all__)
