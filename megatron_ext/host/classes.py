"""Import the optimizer class that ``--optimizer-class`` names."""

from __future__ import annotations

import difflib
import importlib

from ..errors import HostError
from ..policy.request import DEFAULT_CLASS
from .contract import CORE


def resolve_class(path: str) -> type:
    """Import the class that ``--optimizer-class`` names.

    Args:
        path: The dotted path ``package.module.Class``.

    Raises:
        HostError: The class cannot be imported, or is not a subclass of `DistributedOptimizer`.
    """
    base = importlib.import_module(f"{CORE}.distrib_optimizer").DistributedOptimizer
    module, _, name = path.rpartition(".")
    if not module:
        raise HostError(
            f"--optimizer-class {path}: expected a dotted path such as {DEFAULT_CLASS}, found a "
            "name without a module"
        )
    imported = None
    try:
        imported = importlib.import_module(module)
        cls = getattr(imported, name)
    except Exception as e:  # a user's module may raise anything when it is imported
        known = [f"{module}.{other}" for other in dir(imported)] if imported else []
        near = difflib.get_close_matches(path, [DEFAULT_CLASS, *known], 1)
        raise HostError(
            f"--optimizer-class {path}: cannot be imported: {type(e).__name__}: {e}. "
            + (f"Did you mean {near[0]}? " if near else "")
            + f"Is {module} installed in this environment, on every node?"
        ) from e
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise HostError(
            f"--optimizer-class {path}: expected a subclass of {base.__module__}.{base.__name__}, "
            f"found {cls!r}"
        )
    return cls
