"""What a result depends on: versions, hardware, the kernel that was active."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from megatron_ext._ops import native
from megatron_ext.version import __version__

from .measure import without_paths

_ROOT = Path(__file__).parents[2]


def environment(device: str) -> dict[str, Any]:
    """For the report; no host name and no directory."""
    d: native.DeviceType = "cuda" if device == "cuda" else "cpu"
    kernel = native.kernel(d)
    status = _git("status", "--porcelain", "--", "megatron_ext", "csrc")
    out: dict[str, Any] = {
        "torch": torch.__version__,
        "megatron_ext": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": os.environ.get("MEGATRON_EXT_COMMIT") or _git("rev-parse", "HEAD"),
        "uncommitted changes": None if status is None else bool(status),
        "kernel": "native" if kernel.native else "reference",
        "kernel, build record": without_paths(kernel.reason),
        "kernel, sha256": _sha256(native.library(d)) if kernel.native else None,
        "CPU": cpu_name(),
        "CPUs": os.cpu_count(),
        "CPU capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load average at the start": round(os.getloadavg()[0], 2),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        out |= {
            "GPU": properties.name,
            "GPU memory, GiB": round(properties.total_memory / 2**30, 1),
            "GPU multiprocessors": properties.multi_processor_count,
            "GPU driver": _output(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"
            ),
            "CUDA of torch": torch.version.cuda,
        }
    return out


def busy_elsewhere() -> tuple[float, float]:
    """CPU seconds of other processes, and of all CPUs together, since the machine started.

    Their differences over a run say how far its CPU times can be trusted. Zeros where there is no
    ``/proc/stat``.
    """
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except OSError:
        return 0.0, 0.0
    user, nice, system, idle, wait, irq, soft, steal = (t / os.sysconf("SC_CLK_TCK") for t in ticks)
    busy = user + nice + system + irq + soft + steal
    own = os.times()
    return busy - own.user - own.system, busy + idle + wait


def cpu_name() -> str:
    """As the processor calls itself."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or "unknown"


def slug(name: str) -> str:
    """For a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _git(*arguments: str) -> str | None:
    return _output("git", *arguments)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
