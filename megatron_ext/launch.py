"""Run an unmodified Megatron training script with ``--optimizer-class``.

``torchrun ... -m megatron_ext.launch [--cpu] SCRIPT.py [Megatron arguments]``

The script runs on the Megatron that plain Python would give it: that of its own folder first, then
that of ``PYTHONPATH``, then the installed one. The current directory, which ``-m`` puts first,
comes last.

An error before the first step ends every rank with exit status 2. Rank 0 prints the message, each
other rank one line; torchrun shows it as the root cause.

Environment:
    RANK: set by torchrun; rank 0 says which Megatron and which class are used.
    TORCHELASTIC_ERROR_FILE: set by torchrun; where an error is recorded for its summary.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .errors import HostError, MegatronExtError
from .host import megatron
from .policy import flags
from .policy.launch_line import PROG, launcher_parser, own_flags_before, peek

_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
#: Characters of a message that ranks other than 0 print.
_EXCERPT = 200
#: Seconds that these ranks wait. torchrun ends all ranks with the first and shows its error, and
#: rank 0 is the slowest, because it reads the checkpoint.
_PATIENCE = 5.0
#: It imports Megatron, so that it is imported only with a class.
_SESSION = "megatron_ext.hooks.session"


def main(argv: list[str] | None = None) -> None:
    """Parse the launcher's options, prepare Megatron, run the script as ``__main__``.

    Args:
        argv: Launcher options, the script and its arguments; ``sys.argv[1:]`` by default.
    """
    try:
        script, told = _prepared(argv)
    except MegatronExtError as e:
        _stop(e)
    try:
        _run(script)
    except MegatronExtError as e:
        session = sys.modules.get(_SESSION)
        if session is not None and session.is_refused():
            _stop(e, told=told is not None and str(e) == str(told))
        raise
    except ImportError as e:
        from .host.contract import explain_import

        if (error := explain_import(e)) is not None:
            _stop(error)
        raise


def _prepared(argv: list[str] | None) -> tuple[str, MegatronExtError | None]:
    """Prepare Megatron and ``sys.argv`` for the script.

    Returns:
        The script, and the error for which all ranks will stop once they are together. Rank 0 has
        printed it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options = launcher_parser().parse_args(words)
    script = Path(options.script)
    if not script.is_file():
        raise HostError(
            f"{script}: no such script in {Path.cwd()}. Name the training script; Megatron's "
            "arguments stand after it"
        )
    _order_path(script)
    arguments = [*own_flags_before(words, options), *options.arguments]
    args = peek(arguments)
    if options.cpu or args.optimizer_class is not None:
        found = megatron.find()
        _say(f"megatron-core {found.version} from {found.root}")
    if options.cpu:
        from . import cpu

        cpu.install(adam=options.cpu_adam)
    told = _prepare([options.script, *arguments], args)
    if told is not None:
        _print_error(told)
        _say("all ranks stop as soon as they have joined their process group")
    sys.argv = [options.script, *arguments]
    return options.script, told


def _run(script: str) -> None:
    """Run the script; what it raises is in torchrun's summary."""
    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def run() -> bool:
        # With run_path, __main__ is the script: the process that a torch_dist save spawns imports
        # it as it would without the launcher, and nothing of what is rebound here.
        runpy.run_path(script, run_name="__main__")
        return True

    # None if the script has called sys.exit(0).
    if run() and (session := sys.modules.get(_SESSION)) is not None:
        session.require_built()


def _rank() -> int:
    """Return this process's rank, before and after there is a process group."""
    return int(os.environ.get("RANK", "0"))


def _stop(error: MegatronExtError, *, told: bool = False) -> NoReturn:
    """End this rank with exit status 2.

    Args:
        error: The reason.
        told: Whether rank 0 has printed it already.
    """
    if told and _rank() == 0:
        print(f"{PROG}: all ranks stop, because of the error above", file=sys.stderr, flush=True)
    else:
        _print_error(error)
    if _ERROR_FILE in os.environ:
        if _rank() != 0:
            time.sleep(_PATIENCE)
        _record(error)
    sys.exit(2)


def _record(error: MegatronExtError) -> None:
    """Write the error to where torchrun's summary takes it from."""
    from torch.distributed.elastic.multiprocessing.errors import record

    @record
    def refuse() -> NoReturn:
        raise error.with_traceback(None) from None

    with contextlib.suppress(MegatronExtError):
        refuse()


def _print_error(error: MegatronExtError) -> None:
    """Print an error on stderr: on rank 0 as it is, on others the beginning in one line."""
    text = f"{PROG}: error: {error}"
    if _rank() != 0:
        line = " ".join(str(error).split())
        line = line if len(line) <= _EXCERPT else f"{line[:_EXCERPT]} ..."
        text = f"{PROG}: error on rank {_rank()}: {line} (rank 0 prints the whole message)"
    print(text, file=sys.stderr, flush=True)


def _order_path(script: Path) -> None:
    """Order ``sys.path`` as Python does for a script; Megatron must not be imported before.

    The current directory stays, as the last: a class or rule of one's own may be found there.
    """
    if getattr(sys.flags, "safe_path", False):  # python -P, from 3.11 on
        return
    if sys.path[0] == os.getcwd():
        sys.path.append(sys.path.pop(0))
    sys.path.insert(0, str(script.resolve().parent))


def _prepare(argv: list[str], args: argparse.Namespace) -> MegatronExtError | None:
    """Check the request while nothing is built yet, and rebind Megatron for it.

    Returns:
        The error of `preflight.before_the_script`.
    """
    if args.optimizer_class is None:
        _refuse_without_class(args)
        return None
    from .hooks import installing, preflight, session  # refuses a Megatron that cannot be served
    from .host import arguments, classes, contract

    if args.yaml_cfg is not None:
        raise _yaml(args)
    installing.install(arguments=True)
    waiting = None
    helps = {"-h", "--help"} & set(argv[1:])
    if contract.has_training() and not helps:
        args = arguments.parse_arguments(argv)
        waiting = preflight.before_the_script(args)
    request = session.request_of(args)
    classes.resolve_class(request.optimizer_class)
    if not helps:
        _require_device(argv)
    session.launch_request(request)
    _say(f"--optimizer-class {request.optimizer_class}")
    return waiting


def _require_device(argv: Sequence[str]) -> None:
    """Raise on a machine without a GPU, unless Megatron runs on the CPU."""
    import torch

    from . import cpu

    # The count is NVML's. To ask whether CUDA is available would start it, and a script may choose
    # its devices after this.
    if cpu.active() or torch.cuda.device_count() or torch.accelerator.is_available():
        return
    late = [word for word in argv[1:] if word in ("--cpu", "--cpu-adam")]
    raise HostError(
        f"there is no GPU, and {late[0]} stands after the script's name, where the launcher does "
        f"not read it. Put it before: {PROG} --cpu {argv[0]} ..."
        if late
        else f"there is no GPU. To run on the CPU, for a small model: {PROG} --cpu {argv[0]} ..."
    )


def _say(text: str) -> None:
    """Print on rank 0; there is no process group yet."""
    if _rank() == 0:
        print(f"megatron_ext: {text}", flush=True)


def _refuse_without_class(args: argparse.Namespace) -> None:
    given = flags.given_without_class(args)
    if given:
        raise HostError(flags.without_class(given))


def _yaml(args: argparse.Namespace) -> HostError:
    return HostError(
        f"--optimizer-class {args.optimizer_class} with --yaml-cfg: Megatron then replaces all "
        "parsed arguments by the YAML file's, this flag included. Give the arguments on the "
        "command line"
    )


if __name__ == "__main__":
    main()
