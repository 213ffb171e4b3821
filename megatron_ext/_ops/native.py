"""Loading the compiled kernels, and saying which kernel is active and why.

Environment:
    MEGATRON_EXT_KERNEL: ``auto`` (default: compiled kernels where they can be loaded), ``native``
        (an error where they cannot) or ``reference``.
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
#: The stable ABI as csrc/ uses it: lists of tensors (TORCH_TARGET_VERSION in setup.py).
MINIMUM_TORCH = Version("2.10")

DeviceType = Literal["cpu", "cuda"]
DEVICES: tuple[DeviceType, ...] = ("cpu", "cuda")
_DIRECTORY = Path(__file__).parent
#: The rules that a library was built with, as ``csrc/read_table.cpp`` lists them.
_RULES = re.compile(rb"megatron_ext rules:((?:\n[\w ]+)+)\0")


@dataclass(frozen=True)
class Kernel:
    """Which kernel serves a device.

    Args:
        device: ``cpu`` or ``cuda``.
        native: Whether a compiled kernel is active, read from the dispatcher.
        reason: Why it is not; what was built where it is.
    """

    device: DeviceType
    native: bool
    reason: str


def library(device: DeviceType) -> Path:
    """Where the compiled kernels of a device lie if they were built."""
    return _DIRECTORY / f"_{device}.so"


def build_record() -> dict[str, str]:
    """What the build wrote down: per device ``built ...`` or why it was not."""
    path = _DIRECTORY / "build.json"
    try:
        record: dict[str, str] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return record


def built_rules(path: Path) -> str | None:
    """The rules that a library was built with, to be compared with the registry's manifest.

    They are looked up in the file, because a library registers its kernels as it is loaded.

    Returns:
        A line each; None for a library without a list.
    """
    found = _RULES.search(path.read_bytes())
    return found[1].decode() if found else None


def is_native(device: DeviceType) -> bool:
    """Whether the dispatcher has a compiled kernel for every op on this device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(has(f"{NAMESPACE}::{name}", key) for name in OPS)


def kernel(device: DeviceType) -> Kernel:
    """The kernel that serves a device, and why."""
    if is_native(device):
        return Kernel(device, True, build_record().get(device, "built"))
    return Kernel(device, False, _reasons[device])


def load() -> dict[DeviceType, str]:
    """Load what was built, once, at import.

    Returns:
        For each device why its kernels were not loaded; empty for those that were.

    Raises:
        HostError: ``MEGATRON_EXT_KERNEL`` has another value, or is ``native`` and the CPU kernels,
            or on a machine with a CUDA device the CUDA kernels, cannot be loaded.
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
