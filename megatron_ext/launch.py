"""Run an unmodified Megatron training script with ``--optimizer-class``.

``torchrun ... -m megatron_ext.launch [--cpu] SCRIPT.py [Megatron arguments]``
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

from . import arguments
from .errors import MegatronExtError


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
    if options.cpu:
        from . import cpu

        cpu.install(adam=options.cpu_adam)
    try:
        _prepare(options)
    except MegatronExtError as e:
        parser.error(str(e))
    sys.argv = [options.script, *options.arguments]
    sys.path.insert(0, str(script.resolve().parent))
    # With run_path, __main__ is the script: the process that a torch_dist save spawns imports it
    # as it would without the launcher, and nothing of what is rebound here.
    runpy.run_path(options.script, run_name="__main__")
    if "megatron_ext.host" in sys.modules:
        from . import host

        host.require_built()


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
    arguments.add_flags(parser)
    parser.add_argument("script", help="the training script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def _prepare(options: argparse.Namespace) -> None:
    """Check the request while nothing is built yet, and rebind Megatron for it."""
    args = _peek(options)
    if args.optimizer_class is None:
        return
    from . import host

    request = arguments.request_from_args(args)
    _refuse_conflicts(args)
    host.resolve_class(request.optimizer_class)
    host.install(arguments=True)
    host.launch_request(request)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"megatron_ext: --optimizer-class {request.optimizer_class}", flush=True)


def _peek(options: argparse.Namespace) -> argparse.Namespace:
    """This package's flags, given before or after the script, and the flags they conflict with."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=True)
    arguments.add_flags(parser)
    parser.add_argument("--yaml-cfg", default=None)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--use-megatron-fsdp", action="store_true")
    parser.add_argument("--use-torch-fsdp2", action="store_true")
    parser.add_argument("--non-persistent-ckpt-type", default=None)
    parser.add_argument(
        "--use-checkpoint-opt_param-scheduler",
        "--use-checkpoint-opt-param-scheduler",
        dest="use_checkpoint_opt_param_scheduler",
        action="store_true",
    )
    own = {k: v for k, v in vars(options).items() if k in arguments.own_flags()}
    args, _ = parser.parse_known_args(options.arguments, argparse.Namespace(**own))
    return args


def _refuse_conflicts(args: argparse.Namespace) -> None:
    from .errors import HostError

    reasons = {
        "--yaml-cfg": args.yaml_cfg is not None
        and "Megatron then replaces all parsed arguments by the YAML file's, this flag included. "
        "Give the arguments on the command line",
        f"--optimizer {args.optimizer}": args.optimizer in ("sgd", "lion")
        and "only Adam is supported (its state is exp_avg and exp_avg_sq), and chains with it",
        "--use-megatron-fsdp": args.use_megatron_fsdp
        and "Megatron-FSDP does not load through DistributedOptimizer",
        "--use-torch-fsdp2": args.use_torch_fsdp2
        and "torch FSDP2 does not load through the optimizer's load_state_dict",
        "--non-persistent-ckpt-type local": args.non_persistent_ckpt_type == "local"
        and "a local checkpoint takes precedence over --load and is not tested with a selective "
        "resume. Use --non-persistent-ckpt-type global, or none for the first resume",
    }
    for flag, reason in reasons.items():
        if reason:
            raise HostError(f"--optimizer-class {args.optimizer_class} with {flag}: {reason}")


if __name__ == "__main__":
    main()
