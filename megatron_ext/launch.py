"""Run an unmodified Megatron training script with ``--optimizer-class``.

``torchrun ... -m megatron_ext.launch [--cpu] SCRIPT.py [Megatron arguments]``

The script runs on the Megatron that plain Python would give it: that of its own folder first, then
that of ``PYTHONPATH``, then the installed one. The current directory, which ``-m`` puts first,
comes last.

Environment:
    RANK: set by torchrun; rank 0 says which Megatron and which class are used.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

from .errors import HostError, MegatronExtError
from .host import megatron
from .policy import flags


def main(argv: list[str] | None = None) -> None:
    """Parse the launcher's options, prepare Megatron, run the script as ``__main__``.

    Args:
        argv: Launcher options, the script and its arguments; ``sys.argv[1:]`` by default.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    script = Path(options.script)
    if not script.is_file():
        parser.error(f"{script}: no such script")
    _order_path(script)
    arguments_ = [*_own_flags_before(argv, options), *options.arguments]
    args = _peek(arguments_)
    try:
        if options.cpu or args.optimizer_class is not None:
            found = megatron.find()
            _say(f"megatron-core {found.version} from {found.root}")
        if options.cpu:
            from . import cpu

            cpu.install(adam=options.cpu_adam)
        _prepare([options.script, *arguments_], args)
    except MegatronExtError as e:
        parser.error(str(e))
    sys.argv = [options.script, *arguments_]
    # With run_path, __main__ is the script: the process that a torch_dist save spawns imports it
    # as it would without the launcher, and nothing of what is rebound here.
    runpy.run_path(options.script, run_name="__main__")
    if "megatron_ext.hooks.session" in sys.modules:
        from .hooks import session

        session.require_built()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_ext.launch",
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


def _own_flags_before(argv: list[str] | None, options: argparse.Namespace) -> list[str]:
    """This package's flags that were given before the script: they go to its arguments."""
    words = list(sys.argv[1:] if argv is None else argv)
    words = words[: len(words) - len(options.arguments) - 1]
    launcher = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    launcher.add_argument("--cpu", action="store_true")
    launcher.add_argument("--cpu-adam")
    return launcher.parse_known_args(words)[1]


def _order_path(script: Path) -> None:
    """Order ``sys.path`` as Python does for a script; Megatron must not be imported before.

    The current directory stays, as the last: a class or rule of one's own may be found there.
    """
    if getattr(sys.flags, "safe_path", False):  # python -P, from 3.11 on
        return
    if sys.path[0] == os.getcwd():
        sys.path.append(sys.path.pop(0))
    sys.path.insert(0, str(script.resolve().parent))


def _prepare(argv: list[str], args: argparse.Namespace) -> None:
    """Check the request while nothing is built yet, and rebind Megatron for it."""
    if args.optimizer_class is None:
        _refuse_without_class(args)
        return
    from .hooks import installing, preflight, session  # refuses a Megatron that cannot be served
    from .host import arguments, classes, contract

    if args.yaml_cfg is not None:
        raise _yaml(args)
    installing.install(arguments=True)
    if contract.has_training() and not {"-h", "--help"} & set(argv[1:]):
        args = arguments.parse_arguments(argv)
        preflight.before_the_script(args)
    request = session.request_of(args)
    classes.resolve_class(request.optimizer_class)
    session.launch_request(request)
    _say(f"--optimizer-class {request.optimizer_class}")


def _say(text: str) -> None:
    """Print on rank 0; there is no process group yet."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"megatron_ext: {text}", flush=True)


def _peek(words: list[str]) -> argparse.Namespace:
    """This package's flags, and the one that makes Megatron drop them."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=True)
    flags.add_flags(parser)
    parser.add_argument("--yaml-cfg", default=None)
    parser.add_argument(
        "--use-checkpoint-opt_param-scheduler",
        "--use-checkpoint-opt-param-scheduler",
        dest="use_checkpoint_opt_param_scheduler",
        action="store_true",
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
