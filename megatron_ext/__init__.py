"""Resume a Megatron run with other hyperparameters and keep the Adam moments.

Importing this package imports neither torch nor Megatron; its names are loaded on first use.
"""

from __future__ import annotations

import importlib
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
    return sorted(__all__)
