"""Resume runs of Megatron-Bridge with other hyperparameters, and keep the Adam moments.

`resume_with` prepares a `ConfigContainer`; Bridge's `pretrain` then does the rest.
"""

from .hooks.bridge import CheckpointManager, resume_with

__all__ = ["CheckpointManager", "resume_with"]
