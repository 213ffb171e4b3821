"""``python -m megatron_ext env``: print installed versions, active kernels and problems."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import platform
import warnings
from collections.abc import Iterator
from typing import Any

from packaging.version import Version

from ..errors import HostError
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
        help="print installed versions, active kernels and problems",
        description="Print the versions that are imported and the kernels, and check the names of "
        "Megatron that this package uses. Exit status: 0; 1 if there is a problem (megatron-core "
        "is outside the tested range, an installed package is not the one that is imported, or a "
        "device of this machine has no compiled kernel); 2 if MEGATRON_EXT_KERNEL cannot be obeyed "
        "or Megatron lacks names that this package uses.",
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
            output.print_text(to, f"problem: {text}", style="yellow")
    return found["status"]


def environment() -> EnvDocument:
    """Collect the environment as plain data. Imports torch and Megatron.

    Raises:
        HostError: ``MEGATRON_EXT_KERNEL`` cannot be obeyed.
    """
    import torch

    from .._ops import native
    from .._ops.native import ENVIRONMENT
    from .env_versions import imported

    kernels = {device: native.kernel(device) for device in native.DEVICES}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    asked = os.environ.get(ENVIRONMENT, "auto")
    megatron, adam = _megatron()
    with _quiet():
        packages = {name: imported(name) for name in PACKAGES}
    findings = [
        *_megatron_findings(megatron),
        *(p.difference for p in packages.values() if p.difference),
    ]
    for device, kernel in kernels.items():
        # ROCm's devices are named cuda, and there is no kernel that could be built for them.
        can_be_built = device == "cpu" or (devices and torch.version.hip is None)
        if not kernel.native and asked == "auto" and can_be_built:
            findings.append(f"no compiled {device} kernel: {kernel.reason}")
    inner = _inner_optimizer(adam)
    findings += inner["not_importable"].values()
    return {
        "schema": SCHEMA,
        "status": 2 if megatron["contract"] else 1 if findings else 0,
        "findings": findings,
        "versions": {
            "megatron_ext": __version__,
            "python": platform.python_version(),
            **{name: package.version for name, package in packages.items()},
        },
        "paths": {name: package.path for name, package in packages.items()},
        "megatron": megatron,
        "inner_optimizer": inner,
        "cuda_devices": devices,
        "MEGATRON_EXT_KERNEL": asked,
        "kernels": {
            device: {"active": "native" if k.native else "reference", "reason": k.reason}
            for device, k in kernels.items()
        },
    }


def _megatron() -> tuple[MegatronDocument, str | None]:
    """Describe the Megatron on the path, and name its Adam; None if it cannot be used."""
    from ..host import contract

    found: MegatronDocument = {
        "version": None,
        "tested_versions": list(contract.TESTED),
        "tested": False,
        "in_tested_range": False,
        "training": False,
        "contract": [],
    }
    adam = None
    with _quiet():
        try:
            version = contract.megatron_version()
            found |= {
                "version": version,
                "tested": version in contract.TESTED,
                "in_tested_range": contract.in_tested_range(version),
            }
            contract.require_megatron()
            adam = contract.inner_adam()
            found |= {
                "training": contract.has_training(),
                "contract": contract.contract_problems(),
            }
        except HostError as e:
            found["contract"] = [str(e)]
        except Exception as e:  # an installation may be broken in any way
            found["contract"] = [f"megatron.core cannot be imported: {type(e).__name__}: {e}"]
    return found, adam


def _megatron_findings(megatron: MegatronDocument) -> Iterator[str]:
    yield from megatron["contract"]
    first, *_, last = megatron["tested_versions"]
    newer = megatron["version"] is not None and Version(megatron["version"]) > Version(last)
    if newer and not megatron["in_tested_range"]:
        yield (
            f"megatron-core {megatron['version']} is outside the range this package is tested "
            f"with, {first} to {last}"
        )


def _inner_optimizer(name: str | None) -> InnerOptimizerDocument:
    """Describe the Adam inside Megatron's optimizers, and the reason if it is not a fused one."""
    with _quiet():
        problems = {
            name: f"{name} is installed and cannot be imported: {problem}"
            for name, module in _FUSED.items()
            if _is_there(module) and (problem := _import_problem(module))
        }
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
    """Redirect Megatron's import messages to stderr and silence its warnings."""
    with output.logs_to_stderr():
        warnings.simplefilter("ignore")
        yield


def _rows(found: EnvDocument) -> Iterator[tuple[str, str]]:
    megatron, inner = found["megatron"], found["inner_optimizer"]
    for name, version in found["versions"].items():
        path = found["paths"].get(name)
        yield name, (version or "not installed") + (f" from {path}" if path else "")
    tested = "tested" if megatron["tested"] else "not tested itself"
    versions = ", ".join(megatron["tested_versions"])
    yield "this megatron-core", f"{tested} (tested versions: {versions})"
    checked = inner["class"] is not None
    without = _why_not_there() if checked and not megatron["training"] else "not installed"
    yield "megatron.training", "installed" if megatron["training"] else without
    yield "Megatron API contract", _contract_row(megatron) if checked else "not checked"
    reason = f": {inner['reason']}" if inner["reason"] else ""
    yield "inner optimizer", f"{inner['class'] or 'unknown'}{reason}"
    yield "CUDA devices", ", ".join(found["cuda_devices"]) or "none"
    yield "MEGATRON_EXT_KERNEL", found["MEGATRON_EXT_KERNEL"]
    for device, kernel in found["kernels"].items():
        yield f"{device} kernel", f"{kernel['active']}: {kernel['reason']}"


def _why_not_there() -> str:
    """Say why there is no training loop; asked after Megatron itself has been imported."""
    from ..host import contract

    there = importlib.util.find_spec(contract.TRAINING) is not None
    problem = contract.training_problem() if there else ""
    return f"cannot be imported: {problem}" if problem else "not installed"


def _contract_row(megatron: MegatronDocument) -> str:
    """Count the names of the contract that the installed version should have and has."""
    from ..host import contract

    version = Version(str(megatron["version"]))
    names = [
        name
        for name in contract.CONTRACT
        if Version(name.since) <= version
        and (megatron["training"] or not name.module.startswith(contract.TRAINING))
    ]
    return f"{len(names) - len(megatron['contract'])} of {len(names)} names found"
