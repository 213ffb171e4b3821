"""A user's own optimizer class."""

from megatron.core.optimizer import DistributedOptimizer


class Renamed(DistributedOptimizer):
    """Stock under another name."""
