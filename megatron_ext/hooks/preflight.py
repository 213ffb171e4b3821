"""Run the preflight once per process, and stop all ranks together.

The arguments are the same on every rank. Only rank 0 opens the checkpoint, because the size of its
index grows with the whole job. If rank 0 finds a problem before there is a process group, it keeps
the error until there is one.

Environment:
    RANK, WORLD_SIZE: set by torchrun; 0 and 1 without it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from ..base import ranks
from ..base.files import check_writable
from ..errors import HostError, MegatronExtError
from ..host.arguments import global_args
from ..plan.preflight import Preflight, examine
from ..resume.session import current
from .session import request_of


def before_the_script(args: Any) -> MegatronExtError | None:
    """Run the launcher's preflight on every rank, before there is a process group.

    Args:
        args: Megatron's arguments as parsed.

    Returns:
        The error for which all ranks stop once they have a process group; None on other ranks.

    Raises:
        MegatronExtError: The arguments have a problem, or, in a run of one rank, the checkpoint.
    """
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    found = _examined(args, first=rank == 0)
    if found.error is not None and (found.of_arguments or world == 1):
        raise found.error
    current.preflight = found
    return found.error


def _examined(args: Any, *, first: bool) -> Preflight:
    """Examine the arguments; on the first rank also the checkpoint and the report's directory."""
    found = examine(args, read_request=request_of, open_checkpoint=first)
    error = _report_error(args) if first and not found.of_arguments else None
    return found if error is None else replace(found, of_checkpoint=(*found.of_checkpoint, error))


def _report_error(args: Any) -> MegatronExtError | None:
    """Return the error of a directory in which no report can be written."""
    directory = request_of(args).report_dir
    if directory is None:
        return None
    try:
        check_writable(directory)
    except OSError as e:
        return HostError(
            f"--selective-report {directory}: expected a directory in which files can be written: "
            f"{e}. Make room or change its permissions, or choose another directory"
        )
    return None


def error_of(args: Any) -> MegatronExtError | None:
    """Return this rank's preflight error; None without one, or if all ranks have agreed already.

    Args:
        args: Megatron's arguments, for a script that was started without the launcher.
    """
    if current.agreed:
        return None
    if current.preflight is None:
        on_rank_0 = not dist.is_initialized() or dist.get_rank() == 0
        current.preflight = _examined(args, first=on_rank_0)
    return current.preflight.error


def setup(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``setup_model_and_optimizer`` (training/training.py:2017, 0.19.2).

    All ranks agree on the preflight's result before the model is built.
    """

    @functools.wraps(original)
    def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
        megatron_args = global_args()
        if getattr(megatron_args, "optimizer_class", None) is not None and not current.agreed:
            _agree(megatron_args)
            current.agreed = True
        return original(*args, **kwargs)

    return setup_model_and_optimizer


def _agree(args: Any) -> None:
    """Stop every rank if one has an error or is not here."""
    ranks.await_everyone("the preflight")
    ranks.stop_together("the preflight", error_of(args))
