"""Builds the CUDA kernels for the CPU (tests/support/cuda_on_cpu) and loads them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SHIMS = ROOT / "tests/support/cuda_on_cpu"
LAUNCH = re.compile(r"(\w+(?:<[\w:]+>)?)\s*<<<(\w+), (\w+), 0, stream>>>\(")


def load(directory: Path) -> None:
    """Register ``torch.ops.megatron_ext_emulated``; sources and library go into a directory."""
    sources = directory / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    kernels = []
    for path in sources.glob("cuda/*.cu"):
        text, launches = LAUNCH.subn(r"emulate(\1, \2, \3, ", path.read_text())
        assert launches == 1, path
        kernels.append(path.with_suffix(".cpp"))
        kernels[-1].write_text(text)
    assert len(kernels) == 3
    library = directory / "emulated.so"
    torch_root = Path(torch.__file__).parent
    subprocess.run(
        [
            *("c++", "-std=c++20", "-O1", "-fPIC", "-shared", "-w"),
            *("-ffp-contract=off", "-fno-strict-aliasing"),
            "-DTORCH_TARGET_VERSION=0x020A000000000000",
            *(f"-I{SHIMS}", f"-I{sources}", f"-isystem{torch_root / 'include'}"),
            *(str(p) for p in (*kernels, sources / "read_table.cpp", SHIMS / "ops.cpp")),
            *(f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-o", str(library)),
        ],
        check=True,
        timeout=300,
    )
    torch.ops.load_library(str(library))
