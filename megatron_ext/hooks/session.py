"""Find the request in force, which is read once from the arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..errors import HostError
from ..host.arguments import global_args, only_evaluates
from ..policy.flags import values_of
from ..policy.from_flags import request_from_args
from ..policy.request import Request
from ..resume.session import current


def launch_request(request: Request | None) -> None:
    """Set the launcher's request, which holds for the whole process."""
    current.launched = request


@contextlib.contextmanager
def requested(request: Request) -> Iterator[None]:
    """Make a library call's request active for the calls inside."""
    before, current.scoped = current.scoped, request
    try:
        yield
    finally:
        current.scoped = before


def request_of(args: Any) -> Request:
    """Return the request in parsed arguments. Equal arguments become a policy only once.

    Args:
        args: Megatron's namespace, or one that has only this package's flags.

    Raises:
        PolicyError: The flags contradict each other.
    """
    asked = repr(values_of(args))
    if current.read is None or current.read[0] != asked:
        current.read = asked, request_from_args(args)
    return current.read[1]


def active_request() -> Request | None:
    """Return the request of a library call, else of Megatron's arguments, else the launcher's."""
    if current.scoped is not None:
        return current.scoped
    args = global_args()
    if getattr(args, "optimizer_class", None) is not None:
        return request_of(args)
    return current.launched


def is_refused() -> bool:
    """Whether an error now is about the request: the first optimizer has not been built yet."""
    return current.launched is not None and not (current.agreed and current.built)


def require_built() -> None:
    """Raise if a class was requested and no optimizer was built with it.

    Raises:
        HostError: The script built no optimizer through Megatron, or none with this class.
    """
    request = active_request()
    if request is not None and not current.built and not only_evaluates(global_args()):
        raise HostError(
            f"--optimizer-class {request.optimizer_class}: no optimizer was built with it. The "
            "script has to build its optimizer with megatron.core.optimizer.get_megatron_optimizer "
            "(as megatron.training does)"
        )
