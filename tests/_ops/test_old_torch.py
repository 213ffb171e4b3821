"""The kernels with the oldest torch that they support: `make test-torch`.

Its CUDA libraries are not installed; `tests.support.cuda_stubs` has others in their place.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ext._ops import native
from megatron_ext._ops.native import MINIMUM_TORCH
from tests._ops.test_build import HAS_NVCC, ROOT, build
from tests.support.cuda_stubs import make_stubs

VARIABLE = "MEGATRON_EXT_OLD_TORCH"
#: The names that torch may export. Others come from the C and C++ runtimes.
OF_TORCH = re.compile(r"^(aoti_torch_|torch_|_ZN5torch|_ZN3c10|_ZN2at)")

pytestmark = pytest.mark.skipif(
    VARIABLE not in os.environ, reason=f"needs {VARIABLE}, which make test-torch sets"
)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The old torch, said to be for the CUDA of the toolkit.

    Its wheel is for an older CUDA. The libraries bring their own runtime.
    """
    site = Path(os.environ[VARIABLE]) / "torch"
    version = (site / "version.py").read_text()
    found = re.search(r"__version__ = ['\"](\d+\.\d+)", version)
    assert found
    assert found[1] == str(MINIMUM_TORCH)
    here = tmp_path / "site" / "torch"
    here.mkdir(parents=True)
    for name in ("include", "lib"):
        (here / name).symlink_to(site / name)
    (here / "__init__.py").touch()
    cuda = f"cuda: str | None = '{torch.version.cuda}'"
    text, replaced = re.subn(r"^cuda(?:: [^=]+)? = .*$", cuda, version, flags=re.MULTILINE)
    assert replaced == 1
    (here / "version.py").write_text(text)
    return here


def names(library: Path, which: str) -> set[str]:
    done = subprocess.run(
        ["nm", "-D", f"--{which}-only", "--format=just-symbols", library],
        capture_output=True,
        text=True,
        check=True,
    )
    return {line.split("@")[0] for line in done.stdout.split() if OF_TORCH.match(line)}


def test_both_libraries_build_and_need_only_what_the_oldest_torch_has(
    old: Path, tmp_path: Path
) -> None:
    devices = ["cpu", *(["cuda"] if HAS_NVCC else [])]
    built = build(
        tmp_path,
        PYTHONPATH=str(old.parent),
        TORCH_CUDA_ARCH_LIST="9.0",
        **{f"MEGATRON_EXT_BUILD_{device.upper()}": "1" for device in devices},
    )
    assert built.returncode == 0, built.output[-3000:]
    exported = {
        name for path in (old / "lib").glob("libtorch*.so") for name in names(path, "defined")
    }
    for device in devices:
        assert f"against torch {MINIMUM_TORCH}" in built.record[device]
        needed = names(built.library(device), "undefined")
        assert len(needed) > 10
        assert needed <= exported


def test_both_libraries_load_in_the_oldest_torch_and_give_the_reference(tmp_path: Path) -> None:
    """The tests of the op, in a tree of their own."""
    overlay = Path(os.environ[VARIABLE])
    stubs, tree = tmp_path / "stubs", tmp_path / "tree"
    for directory in (stubs, tree):
        directory.mkdir()
    assert len(make_stubs(overlay / "torch" / "lib", stubs)) > 10
    for name in ("tests", "pyproject.toml"):
        (tree / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "megatron_ext", tree / "megatron_ext")
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tree}:{overlay}",
        "LD_LIBRARY_PATH": str(stubs),
        "MEGATRON_EXT_KERNEL": "native",
    }

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    loaded = run(
        "-c",
        "import torch; from megatron_ext._ops import native; "
        "print(torch.__version__, *(native.kernel(d).native for d in ('cpu', 'cuda')))",
    )
    assert re.fullmatch(
        rf"{MINIMUM_TORCH}\.\d+\S* True {native.library('cuda').exists()}\n", loaded
    )
    summary = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/_ops/test_ops.py")
    passed = re.search(r"(\d+) passed", summary.splitlines()[-1])
    assert passed
    assert int(passed[1]) > 300
