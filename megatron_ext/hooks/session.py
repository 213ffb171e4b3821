"""What was asked for and done in this process: the one object with state."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import HostError
from ..host.arguments import global_args
from ..policy.from_flags import request_from_args
from ..policy.request import Request
from ..resume.session import Resume


@dataclass
class State:
    """What has been asked for and done in this process.

    Args:
        launched: The launcher's request.
        built: How many optimizers were built by request.
        loading: The resume whose checkpoint Megatron is loading.
        resumed: The same, where the optimizer is loaded too; afterwards that of the running
            training.
    """

    launched: Request | None = None
    built: int = 0
    loading: Resume | None = None
    resumed: Resume | None = None


state = State()
_scoped: contextvars.ContextVar[Request | None] = contextvars.ContextVar("request", default=None)


def launch_request(request: Request | None) -> None:
    """Set the request of the whole process (the launcher's)."""
    state.launched = request


@contextlib.contextmanager
def requested(request: Request) -> Iterator[None]:
    """Make a request active for the calls inside (a library call's)."""
    token = _scoped.set(request)
    try:
        yield
    finally:
        _scoped.reset(token)


def active_request() -> Request | None:
    """The request in force: a library call's, else Megatron's arguments, else the launcher's."""
    return _scoped.get() or _request_from_megatron_args() or state.launched


def require_built() -> None:
    """Raise if a class was asked for and nothing was built with it.

    Raises:
        HostError: The script built no optimizer through Megatron, or not with this class.
    """
    request = active_request()
    if request is not None and not state.built:
        raise HostError(
            f"--optimizer-class {request.optimizer_class}: no optimizer was built with it. The "
            "script has to build its optimizer with megatron.core.optimizer.get_megatron_optimizer "
            "(as megatron.training does), and --skip-train builds none"
        )


def _request_from_megatron_args() -> Request | None:
    args = global_args()
    if getattr(args, "optimizer_class", None) is None:
        return None
    return request_from_args(args)
