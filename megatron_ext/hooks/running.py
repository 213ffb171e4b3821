"""Wrap the training loop for the writers and the end of a dry run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..base.log import say
from ..host.arguments import global_args
from ..resume.session import current
from . import writers
from .session import active_request


def train(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``train`` (training/training.py:3342, 0.19.2). A dry run ends here, on every rank."""

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        request = active_request()
        if request is not None and request.dry_run:
            say(
                "megatron_ext: --selective-dry-run: model and optimizer are built and loaded; "
                "no training step is run"
            )
            if dist.is_initialized():
                dist.barrier()
                dist.destroy_process_group()
            sys.exit(0)
        resume = current.resumed
        if resume is not None and resume.complete:
            writers.write_to_writers(resume, int(global_args().iteration))
        return original(*args, **kwargs)

    return run
