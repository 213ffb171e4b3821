"""Run an unmodified Megatron training script with ``--optimizer-class``.

``torchrun ... -m megatron_ext.launch [--cpu] SCRIPT.py [Megatron arguments]``

The script runs on the Megatron that plain Python would give it: that of its own folder first, then
that of ``PYTHONPATH``, then the installed one. The current directory, which ``-m`` puts first,
comes last.

An error before the first step ends every rank with exit status 2. Rank 0 prints the message, each
other rank one line; torchrun shows it as the root cause.

Environment:
    RANK: set by torchrun; rank 0 says which Megatron and which class are used.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .base.stopping import print_error, rank, stop
from .base.text import suggestions
from .errors import HostError, MegatronExtError
from .host import megatron
from .policy import flags

_PROG = "python -m megatron_ext.launch"


def main(argv: list[str] | None = None) -> None:
    """Parse the launcher's options, prepare Megatron, run the script as ``__main__``.

    Args:
        argv: Launcher options, the script and its arguments; ``sys.argv[1:]`` by default.
    """
    try:
        script, told = _prepared(argv)
    except MegatronExtError as e:
        stop(_PROG, e)
    try:
        _run(script)
    except MegatronExtError as e:
        if _is_refused():
            stop(_PROG, e, told=told is not None and str(e) == str(told))
        raise
    except ImportError as e:
        from .host.contract import explain_import

        if (error := explain_import(e)) is not None:
            stop(_PROG, error)
        raise


def _prepared(argv: list[str] | None) -> tuple[str, MegatronExtError | None]:
    """Prepare Megatron and ``sys.argv`` for the script.

    Returns:
        The script, and the error for which all ranks will stop once they are together. Rank 0 has
        printed it.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(words)
    script = Path(options.script)
    if not script.is_file():
        raise HostError(
            f"{script}: no such script in {Path.cwd()}. Name the training script; Megatron's "
            "arguments stand after it"
        )
    _order_path(script)
    arguments = [*_own_flags_before(words, options), *options.arguments]
    args = _peek(arguments)
    if options.cpu or args.optimizer_class is not None:
        found = megatron.find()
        _say(f"megatron-core {found.version} from {found.root}")
    if options.cpu:
        from . import cpu

        cpu.install(adam=options.cpu_adam)
    told = _prepare([options.script, *arguments], args)
    if told is not None:
        print_error(_PROG, told)
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
    if run() and "megatron_ext.hooks.session" in sys.modules:
        from .hooks import session

        session.require_built()


def _is_refused() -> bool:
    """Whether an error of the script is a refusal by the preflight, or that nothing was built."""
    if "megatron_ext.resume.session" not in sys.modules:
        return False
    from .resume.session import current

    return current.launched is not None and not (current.agreed and current.built)


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print below a usage of forty lines."""

    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments"):
            unknown = [word for word in message.split() if word.startswith("--")]
            hint = suggestions(unknown, self._option_string_actions) or (
                " Megatron's arguments stand after the script's name."
            )
        raise HostError(f"{message}.{hint} All options: {_PROG} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROG,
        description="Run an unmodified Megatron training script with --optimizer-class.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--cpu",
        action="store_true",
        help="Run on the CPU over gloo where there is no GPU (demos, tests, dry runs).",
    )
    parser.add_argument(
        "--cpu-adam",
        choices=("fused", "torch"),
        default="fused",
        help="With --cpu: the inner optimizer, a stand-in for TE's and apex's FusedAdam "
        "(default) or torch's AdamW, Megatron's own fallback.",
    )
    flags.add_flags(parser)
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def _own_flags_before(words: Sequence[str], options: argparse.Namespace) -> list[str]:
    """This package's flags that were given before the script: they go to its arguments."""
    words = words[: len(words) - len(options.arguments) - 1]
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--cpu", action="store_true")
    launcher.add_argument("--cpu-adam")
    return list(launcher.parse_known_args(words)[1])


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
        f"not read it. Put it before: {_PROG} --cpu {argv[0]} ..."
        if late
        else f"there is no GPU. To run on the CPU, for a small model: {_PROG} --cpu {argv[0]} ..."
    )


def _say(text: str) -> None:
    """Print on rank 0; there is no process group yet."""
    if rank() == 0:
        print(f"megatron_ext: {text}", flush=True)


def _peek(words: list[str]) -> argparse.Namespace:
    """This package's flags, and the one that makes Megatron drop them."""
    parser = _Parser(prog=_PROG, add_help=False, allow_abbrev=False)
    flags.add_flags(parser)
    parser.add_argument("--yaml-cfg", default=None)
    parser.add_argument(
        "--use-checkpoint-opt_param-scheduler",
        "--use-checkpoint-opt-param-scheduler",
        dest="use_checkpoint_opt_param_scheduler",
        action="store_true",
    )
    classes = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    classes.add_argument("--optimizer-class", action="append", default=[])
    given = list(dict.fromkeys(classes.parse_known_args(words)[0].optimizer_class))
    if len(given) > 1:
        raise HostError(
            f"--optimizer-class is given {len(given)} times, with different classes: "
            f"{', '.join(given)}. Give the one that is meant"
        )
    return parser.parse_known_args(words)[0]


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
