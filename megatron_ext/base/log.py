"""Messages to the user, printed where Megatron prints its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from .text import printable


def say(lines: str | Sequence[str]) -> None:
    """Print on rank 0, where Megatron prints its own log (its handler drops foreign loggers)."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        for line in [lines] if isinstance(lines, str) else lines:
            print(printable(line), flush=True)
