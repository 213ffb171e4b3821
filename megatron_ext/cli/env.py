"""``python -m megatron_ext env``: what is installed, what is active, and why not."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from ..version import __version__
from . import output
from .env_document import PACKAGES, SCHEMA, EnvDocument, InnerOptimizerDocument, MegatronDocument

#: Where Megatron looks for a fused Adam, in this order (core/optimizer/__init__.py, 0.19.2).
_FUSED = {
    "transformer-engine": "transformer_engine.pytorch.optimizers",
    "apex": "apex.optimizers",
}


def add_to(commands: Any) -> None:
    """Add the command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "env",
        help="what is installed, what is active, and why not",
        description="Versions, kernels, and whether the installed Megatron has what this package "
        "leans on. Exit status: 0, 1 where something is not as it should be (a megatron-core "
        "outside of the tested range, a kernel that is missing for a device that is there), 2 "
        "where MEGATRON_EXT_KERNEL cannot be obeyed or Megatron lacks what is needed.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the environment; see the description for the exit status."""
    return output.guarded(lambda: _env(options))


def _env(options: argparse.Namespace) -> int:
    found = environment()
    if options.json:
        output.print_json(found)
    else:
        to = output.console()
        output.print_table(to, "environment", ("", ""), _rows(found))
        for text in found["findings"]:
            to.print(output.cell(f"not as it should be: {text}"))
    return found["status"]


def environment() -> EnvDocument:
    """The same as plain data; imports torch and Megatron.

    Raises:
        HostError: ``MEGATRON_EXT_KERNEL`` cannot be obeyed.
    """
    import torch

    from .._ops import native
    from .._ops.native import ENVIRONMENT

    kernels = {device: native.kernel(device) for device in native.DEVICES}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    asked = os.environ.get(ENVIRONMENT, "auto")
    megatron = _megatron()
    findings = list(_megatron_findings(megatron))
    for device, kernel in kernels.items():
        if not kernel.native and asked == "auto" and (device == "cpu" or devices):
            findings.append(f"no compiled {device} kernel: {kernel.reason}")
    inner = _inner_optimizer(broken=megatron["version"] is None)
    findings += inner["not_importable"].values()
    broken = megatron["version"] is None or bool(megatron["contract"])
    return {
        "schema": SCHEMA,
        "status": 2 if broken else 1 if findings else 0,
        "findings": findings,
        "versions": {
            "megatron_ext": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "megatron": megatron,
        "inner_optimizer": inner,
        "cuda_devices": devices,
        "MEGATRON_EXT_KERNEL": asked,
        "kernels": {
            device: {"active": "native" if k.native else "reference", "reason": k.reason}
            for device, k in kernels.items()
        },
    }


def _megatron() -> MegatronDocument:
    """What this package has to do with; ``contract`` lists what is missing."""
    from ..host import contract

    found: MegatronDocument = {
        "version": None,
        "tested_versions": list(contract.TESTED),
        "tested": False,
        "in_tested_range": False,
        "training": False,
        "contract": [],
    }
    with _quiet():
        try:
            version = contract.megatron_version()
            found |= {
                "version": version,
                "tested": version in contract.TESTED,
                "in_tested_range": contract.in_tested_range(version),
                "training": contract.has_training(),
                "contract": contract.contract_problems(),
            }
        except Exception as e:  # an installation may be broken in any way
            found["contract"] = [f"megatron.core cannot be imported: {type(e).__name__}: {e}"]
    return found


def _megatron_findings(megatron: MegatronDocument) -> Iterator[str]:
    yield from megatron["contract"]
    if megatron["version"] is not None and not megatron["in_tested_range"]:
        first, *_, last = megatron["tested_versions"]
        yield (
            f"megatron-core {megatron['version']} is outside the range this package is tested "
            f"with, {first} to {last}"
        )


def _inner_optimizer(broken: bool) -> InnerOptimizerDocument:
    """The Adam inside Megatron's optimizers, and why it is not a fused one."""
    from ..host import contract

    with _quiet():
        problems = {
            name: f"{name} is installed and cannot be imported: {problem}"
            for name, module in _FUSED.items()
            if _is_there(module) and (problem := _import_problem(module))
        }
        name = None if broken else contract.inner_adam()
    if name is None or not name.startswith("torch."):
        reason = ""
    else:
        reason = "; ".join(problems.values()) or "neither transformer-engine nor apex is installed"
    return {"class": name, "reason": reason, "not_importable": problems}


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def _import_problem(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as e:  # without a driver a library of CUDA may fail in any way
        return f"{type(e).__name__}: {e}"
    return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what Megatron says while it is imported away from what is printed."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _rows(found: EnvDocument) -> Iterator[tuple[str, str]]:
    megatron, inner = found["megatron"], found["inner_optimizer"]
    for name, version in found["versions"].items():
        yield name, version or "not installed"
    tested = "tested" if megatron["tested"] else "not itself tested"
    yield "megatron-core is", f"{tested} ({', '.join(megatron['tested_versions'])})"
    yield "megatron.training", "there" if megatron["training"] else "not in this installation"
    missing = len(megatron["contract"])
    yield "what Megatron has to have", f"{missing} missing" if missing else "all there"
    reason = f": {inner['reason']}" if inner["reason"] else ""
    yield "inner optimizer", f"{inner['class'] or 'unknown'}{reason}"
    yield "CUDA devices", ", ".join(found["cuda_devices"]) or "none"
    yield "MEGATRON_EXT_KERNEL", found["MEGATRON_EXT_KERNEL"]
    for device, kernel in found["kernels"].items():
        yield f"{device} kernel", f"{kernel['active']}: {kernel['reason']}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        found = importlib.util.find_spec(distribution.replace("-", "_"))
        return "present, version unknown" if found else None
