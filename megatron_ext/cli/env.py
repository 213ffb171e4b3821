"""``python -m megatron_ext env``: versions, and which kernel serves which device, and why."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from typing import Any

from ..errors import MegatronExtError
from ..version import __version__

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "apex")


def add_to(commands: Any) -> None:
    """Add the command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "env", help="versions, and which kernel serves which device", description=__doc__
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the environment; exit status 1 where ``MEGATRON_EXT_KERNEL`` cannot be obeyed."""
    try:
        found = environment()
    except MegatronExtError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    for name, version in found["versions"].items():
        print(f"{name:20} {version or 'not installed'}")
    print(f"{'CUDA devices':20} {', '.join(found['cuda_devices']) or 'none'}")
    print(f"{'MEGATRON_EXT_KERNEL':20} {found['MEGATRON_EXT_KERNEL']}")
    for device, kernel in found["kernels"].items():
        print(f"{device + ' kernel':20} {kernel['active']}: {kernel['reason']}")
    return 0


def environment() -> dict[str, Any]:
    """The same as plain data.

    Raises:
        HostError: ``MEGATRON_EXT_KERNEL`` cannot be obeyed.
    """
    import torch

    from .. import _ops
    from .._ops.native import ENVIRONMENT

    kernels = {device: _ops.kernel(device) for device in _ops.DEVICES}
    devices = range(torch.cuda.device_count())
    return {
        "versions": {
            "megatron_ext": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "cuda_devices": [torch.cuda.get_device_name(i) for i in devices],
        ENVIRONMENT: os.environ.get(ENVIRONMENT, "auto"),
        "kernels": {
            device: {"active": "native" if k.native else "reference", "reason": k.reason}
            for device, k in kernels.items()
        },
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        found = importlib.util.find_spec(distribution.replace("-", "_"))
        return "present, version unknown" if found else None
