"""Load the compiled kernels, and report which kernel is active and why.

Environment:
    MEGATRON_EXT_KERNEL: ``auto`` (the default) uses compiled kernels if they can be loaded,
        ``native`` raises an error if they cannot, and ``reference`` uses none.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from packaging.version import Version

from ..errors import HostError
from ..rules import registry
from .schema import NAMESPACE, OPS

ENVIRONMENT = "MEGATRON_EXT_KERNEL"
#: First torch with the stable ABI that csrc/ needs, for lists of tensors (TORCH_TARGET_VERSION in
#: setup.py).
MINIMUM_TORCH = Version("2.10")

DeviceType = Literal["cpu", "cuda"]
DEVICES: tuple[DeviceType, ...] = ("cpu", "cuda")
_DIRECTORY = Path(__file__).parent
#: The list of rules in a library, as ``csrc/read_table.cpp`` writes it.
_RULES = re.compile(rb"megatron_ext rules:((?:\n[\w ]+)+)\0")


@dataclass(frozen=True)
class Kernel:
    """The kernel that is active on a device.

    Args:
        device: ``cpu`` or ``cuda``.
        native: Whether a compiled kernel is active, according to the dispatcher.
        reason: The record of the build, or the reason why no compiled kernel is active.
    """

    device: DeviceType
    native: bool
    reason: str


def library(device: DeviceType) -> Path:
    """Return the path of a device's compiled kernels, whether they were built or not."""
    return _DIRECTORY / f"_{device}.so"


def build_record() -> dict[str, str]:
    """Read the build's record: for each device ``built ...``, or the reason why it was not."""
    path = _DIRECTORY / "build.json"
    try:
        record: dict[str, str] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return record


def built_rules(path: Path) -> str | None:
    """Read the rules that a library was built with, for a comparison with the registry's manifest.

    The function reads them from the file, because loading a library registers its kernels.

    Returns:
        One line per rule; None for a library without a list.
    """
    found = _RULES.search(path.read_bytes())
    return found[1].decode() if found else None


def is_native(device: DeviceType) -> bool:
    """Whether the dispatcher has a compiled kernel for every op on this device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(has(f"{NAMESPACE}::{name}", key) for name in OPS)


def kernel(device: DeviceType) -> Kernel:
    """Return the kernel that is active on a device, with the reason."""
    if is_native(device):
        return Kernel(device, True, build_record().get(device, "built"))
    return Kernel(device, False, _reasons[device])


def load() -> dict[DeviceType, str]:
    """Load the libraries that were built, once, at import.

    Returns:
        For each device, the reason why its kernels were not loaded; empty if they were.

    Raises:
        HostError: ``MEGATRON_EXT_KERNEL`` has an invalid value, or it is ``native`` and the CPU
            kernels or, on a machine with a CUDA device, the CUDA kernels cannot be loaded.
    """
    wanted = os.environ.get(ENVIRONMENT, "auto")
    if wanted not in ("auto", "native", "reference"):
        raise HostError(f"{ENVIRONMENT} is {wanted!r}; it must be auto, native or reference")
    reasons = {
        d: _load(d) if wanted != "reference" else f"{ENVIRONMENT}=reference" for d in DEVICES
    }
    needed = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    missing = [f"{d}: {reasons[d]}" for d in DEVICES if d in needed and reasons[d]]
    if wanted == "native" and missing:
        raise HostError(
            f"{ENVIRONMENT}=native, but there are no compiled kernels for {'; '.join(missing)}. "
            "Build them (pip install --no-build-isolation -v . says what is missing) or take "
            f"{ENVIRONMENT}=auto"
        )
    return reasons


def _load(device: DeviceType) -> str:
    if Version(Version(torch.__version__).public) < MINIMUM_TORCH:
        return f"torch {torch.__version__} is older than {MINIMUM_TORCH}"
    if not library(device).exists():
        return build_record().get(device, "not built: built without setup.py")
    if device == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if built_rules(library(device)) != registry.manifest():
        return (
            f"{library(device).name} was built with other moment rules than are registered: build "
            "it again"
        )
    try:
        torch.ops.load_library(str(library(device)))
    except OSError as e:
        return f"{library(device).name} cannot be loaded: {e}"
    return ""


_reasons = load()
