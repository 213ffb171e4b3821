"""That optimizers are to be built with a class of the user's choice: who asked for it, and what."""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import report_files
from ..errors import HostError
from ..phase import Where
from ..policy import ResumePolicy
from ..resume import Resume
from .contract import CORE, TRAINING, megatron_version

DEFAULT_CLASS = "megatron_ext.SelectiveAdam"


@dataclass(frozen=True)
class Request:
    """That optimizers are to be built with a class of the user's choice.

    Args:
        optimizer_class: Dotted path to a `DistributedOptimizer` subclass.
        policy: What to take from where, for `SelectiveAdam` and its subclasses.
        report_dir: Where the report goes, or None.
        where: What the directory of ``--load`` is to the phase.
        guard: Whether the first resumed steps are checked against the plan.
        dry_run: Whether the run ends before its first step.
    """

    optimizer_class: str = DEFAULT_CLASS
    policy: ResumePolicy = field(default_factory=ResumePolicy)
    report_dir: Path | None = None
    where: Where = "load"
    guard: bool = True
    dry_run: bool = False

    def resume(self) -> Resume:
        """A resume to be shared by the optimizers of a chain."""
        write = None if self.report_dir is None else report_files.writer(self.report_dir)
        return Resume(self.policy, write, megatron_version(), where=self.where)


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


def resolve_class(path: str) -> type:
    """Import the class ``--optimizer-class`` names.

    Args:
        path: ``package.module.Class``.

    Raises:
        HostError: It cannot be imported or is no `DistributedOptimizer` subclass.
    """
    base = importlib.import_module(f"{CORE}.distrib_optimizer").DistributedOptimizer
    module, _, name = path.rpartition(".")
    if not module:
        raise HostError(
            f"--optimizer-class {path}: expected a dotted path such as {DEFAULT_CLASS}, found a "
            "name without a module"
        )
    try:
        cls = getattr(importlib.import_module(module), name)
    except Exception as e:  # a user's module may fail to import in any way
        raise HostError(
            f"--optimizer-class {path}: cannot be imported: {type(e).__name__}: {e}. Is {module} "
            "installed in this environment, on every node?"
        ) from e
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise HostError(
            f"--optimizer-class {path}: expected a subclass of {base.__module__}.{base.__name__}, "
            f"found {cls!r}"
        )
    return cls


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


def parse_arguments(argv: list[str]) -> Any:
    """Megatron's own parsing of a command line, before its validation; flags it lacks are ignored.

    Args:
        argv: The script's name and its arguments.

    Raises:
        SystemExit: argparse refuses them, as it would in the script.
    """
    module = importlib.import_module(f"{TRAINING}.arguments")
    before, sys.argv = sys.argv, argv
    try:
        return module.parse_args(ignore_unknown_args=True)
    finally:
        sys.argv = before


def megatron_parser(prog: str, usage: str) -> argparse.ArgumentParser:
    """Megatron's own parser, without what this package adds to it in a run.

    Args:
        prog: For its messages.
        usage: In place of its own, which names every flag.
    """
    add = importlib.import_module(f"{TRAINING}.arguments").add_megatron_arguments
    add = getattr(add, "__megatron_ext_original__", add)
    parser: argparse.ArgumentParser = add(
        argparse.ArgumentParser(prog=prog, usage=usage, allow_abbrev=False)
    )
    return parser


def global_args() -> Any:
    """Megatron's parsed arguments, or None (also where megatron.training is not used)."""
    module = sys.modules.get(f"{TRAINING}.global_vars")
    return getattr(module, "_GLOBAL_ARGS", None)


def _request_from_megatron_args() -> Request | None:
    args = global_args()
    if getattr(args, "optimizer_class", None) is None:
        return None
    from ..arguments import request_from_args

    return request_from_args(args)
