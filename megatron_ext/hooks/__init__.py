"""The wrappers of Megatron's functions, through which Megatron calls this package.

Its modules import Megatron, so that a Megatron that is missing, too old or mixed from two copies is
refused here, before one of them fails on it.
"""

from ..host.contract import require_megatron

require_megatron()
