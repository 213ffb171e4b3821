"""Run the contract check and two phases against a checkout of Megatron-LM.

``python -m tests.support.contract_check PATH``. Exit status: 0; 1 if something has moved or a
resume differs. A version that is newer than the tested ones is a warning.

The checkout is not written to: its ``megatron`` is copied, and the dataset helpers, which Megatron
compiles with pybind11, are compiled there with the headers that torch brings.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from torch.utils import cpp_extension

from tests.support.pool import ROOT

RESUME = "tests/hooks/test_two_phases.py"


def main(checkout: Path) -> int:
    if not (checkout / "megatron" / "core").is_dir():
        sys.exit(f"{checkout} has no megatron/core: give the folder of a Megatron-LM checkout")
    with tempfile.TemporaryDirectory(prefix="contract") as directory:
        copy = Path(directory)
        shutil.copytree(checkout / "megatron", copy / "megatron")
        compile_helpers(copy / "megatron" / "core" / "datasets")
        # Megatron-LM has a package `tests` too.
        path = os.pathsep.join([str(ROOT), str(copy)])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        megatron = contract_of(env)
        said = [f"moved: {problem}" for problem in megatron["contract"]]
        if not megatron["in_tested_range"]:
            tested = ", ".join(megatron["tested_versions"])
            said.append(f"warning: this version is not one of those that are tested ({tested})")
        print(f"megatron-core {megatron['version']} from {checkout}", *said, sep="\n", flush=True)
        if not megatron["training"]:
            print("it has no training loop: no phase was run")
            return 1
        pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", RESUME]
        failed = subprocess.run(pytest, cwd=ROOT, env=env).returncode != 0
    print(f"two phases: {'FAILED' if failed else 'as they should be'}")
    return int(failed or bool(megatron["contract"]))


def compile_helpers(folder: Path) -> None:
    """Megatron compiles them at the first start, which needs pybind11 itself."""
    library = folder / f"helpers_cpp{sysconfig.get_config_var('EXT_SUFFIX')}"
    if library.exists():
        return
    headers = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    flags = ["-shared", "-std=c++20", "-fPIC", *(f"-I{header}" for header in headers)]
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, *flags, folder / "helpers.cpp", "-o", library], check=True)


def contract_of(env: dict[str, str]) -> dict[str, Any]:
    """What `env` says of Megatron."""
    command = [sys.executable, "-m", "megatron_ext", "env", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        sys.exit(1)  # the error has been printed
    found: dict[str, Any] = json.loads(done.stdout)["megatron"]
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make contract MEGATRON_PATH=/path/to/Megatron-LM")
    sys.exit(main(Path(sys.argv[1]).resolve()))
