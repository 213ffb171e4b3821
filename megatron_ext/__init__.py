"""Resume a Megatron run with other hyperparameters and keep the Adam moments.

Importing this package imports neither torch nor Megatron; its names are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .arguments import add_arguments
    from .build import get_megatron_optimizer
    from .errors import (
        AgreementError,
        CheckpointError,
        GuardError,
        HostError,
        MegatronExtError,
        PlanError,
        PolicyError,
    )
    from .live import transform_moments
    from .optimizer import SelectiveAdam
    from .policy import GroupRule, Match, MomentRule, ResumePolicy
    from .presets import Preset

_WHERE = {
    "SelectiveAdam": "optimizer",
    "ResumePolicy": "policy",
    "GroupRule": "policy",
    "Match": "policy",
    "MomentRule": "policy",
    "Preset": "presets",
    "transform_moments": "live",
    "get_megatron_optimizer": "build",
    "add_arguments": "arguments",
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
    "get_megatron_optimizer",
    "transform_moments",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
