"""Errors a user can meet. Each message names the thing, what was found and the way out."""

from __future__ import annotations


class MegatronExtError(RuntimeError):
    """Base class of every error raised by this package."""


class PolicyError(MegatronExtError, ValueError):
    """What the user asked for contradicts itself or names something that cannot be decided."""


class PlanError(MegatronExtError):
    """The policy cannot be carried out on this checkpoint with these parameter groups."""


class CheckpointError(MegatronExtError):
    """The checkpoint lacks the optimizer state that is to be kept, or does not fit the model."""


class AgreementError(MegatronExtError):
    """The ranks came to different decisions, or another rank refused."""


class HostError(MegatronExtError):
    """The installed Megatron, or the way it was launched, is not one this package can serve."""


class GuardError(MegatronExtError):
    """The first steps after a resume are not those that were planned."""
