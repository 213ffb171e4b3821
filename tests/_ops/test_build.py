"""Building csrc/: for every architecture, without a warning or a spill; and where it cannot be."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megatron_ext.version import __version__

ROOT = Path(__file__).resolve().parents[2]
HAS_NVCC = bool(os.environ.get("CUDA_HOME") or shutil.which("nvcc")) and torch.version.cuda


@dataclass(frozen=True)
class Built:
    """What a build left behind."""

    returncode: int
    output: str
    record: dict[str, str]
    directory: Path

    def library(self, device: str) -> Path:
        return self.directory / "lib" / "megatron_ext" / "_ops" / f"_{device}.so"

    def log(self, device: str) -> str:
        return (self.directory / "temp" / device / "compile.log").read_text()


def build(directory: Path, **environment: str) -> Built:
    arguments = ["setup.py", "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
    arguments[3], arguments[5] = str(directory / "lib"), str(directory / "temp")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MEGATRON_EXT", "TORCH_CUDA"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    path = directory / "lib" / "megatron_ext" / "_ops" / "build.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    return Built(done.returncode, done.stdout + done.stderr, record, directory)


@pytest.fixture
def wrapper(tmp_path: Path) -> Path:
    """A directory with an nvcc that is a script and calls the real one."""
    real = shutil.which("nvcc") or Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"
    path = tmp_path / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    path.chmod(0o755)
    return path.parent


@pytest.mark.skipif(not HAS_NVCC, reason="needs a CUDA toolkit and a torch with CUDA")
@pytest.mark.parametrize(
    ("chosen", "architectures"),
    [
        ({"TORCH_CUDA_ARCH_LIST": "9.0"}, {"sm_90"}),
        # 40 s of a core each.
        pytest.param({}, {"sm_80", "sm_90", "sm_100"}, marks=pytest.mark.all),
    ],
    ids=["one architecture", "those of a release"],
)
def test_the_cuda_kernels_compile_without_warning_or_spill(
    chosen: dict[str, str], architectures: set[str], wrapper: Path, tmp_path: Path
) -> None:
    built = build(
        tmp_path,
        PATH=f"{wrapper}:{os.environ['PATH']}",
        CUDA_HOME="",
        MEGATRON_EXT_BUILD_CPU="0",
        MEGATRON_EXT_BUILD_CUDA="1",
        **chosen,
    )
    assert built.returncode == 0, built.output[-3000:]
    assert built.library("cuda").exists()
    log = built.log("cuda")
    assert str(wrapper) not in log
    assert "warning" not in log.lower().replace("all-warnings", "")
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(sm_\d+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        re.DOTALL,
    )
    # Three kinds of statistics, the comparison and the histogram, for each architecture.
    assert len(found) == 5 * len(architectures)
    assert {arch for _, arch, *_ in found} == architectures
    assert {(name, arch) for name, arch, *spilled, _ in found if spilled != ["0", "0"]} == set()
    assert ("code=compute_100" in built.record["cuda"]) == (not chosen)


def test_without_a_compiler_the_package_builds_and_says_why(tmp_path: Path) -> None:
    built = build(tmp_path, CXX="no-such-compiler")
    assert built.returncode == 0, built.output[-3000:]
    assert not built.library("cpu").exists()
    reason = "not built: no C++ compiler: no-such-compiler is not on the PATH"
    assert built.record == {"cpu": reason, "cuda": reason}


def test_a_compiler_that_fails_is_no_silent_success(tmp_path: Path) -> None:
    built = build(tmp_path, CXX="false", MEGATRON_EXT_BUILD_CUDA="0")
    assert built.returncode == 0
    assert re.match(r"not built: false failed on csrc/\S+ with exit status 1", built.record["cpu"])
    assert built.record["cuda"] == "not built: MEGATRON_EXT_BUILD_CUDA=0"


def test_the_first_error_of_a_compiler_is_in_the_record(tmp_path: Path) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(
        "#!/bin/sh\necho 'In file included from here' >&2\n"
        "echo 'a.h:3:4: error: this torch is not for us' >&2\necho 'b.h: error: 2' >&2\nexit 4\n"
    )
    compiler.chmod(0o755)
    built = build(tmp_path, CXX=str(compiler), MEGATRON_EXT_BUILD_CUDA="0")
    assert re.fullmatch(
        rf"not built: {re.escape(str(compiler))} failed on csrc/\S+ with exit status 4: "
        r"a\.h:3:4: error: this torch is not for us",
        built.record["cpu"],
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"MEGATRON_EXT_BUILD_CPU": "1", "CXX": "no-such-compiler"},
            "MEGATRON_EXT_BUILD_CPU=1, but: no C++ compiler: no-such-compiler",
        ),
        (
            {"MEGATRON_EXT_BUILD_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "MEGATRON_EXT_BUILD_CUDA=1, but: no nvcc in /nowhere/bin",
        ),
        ({"MEGATRON_EXT_BUILD_CUDA": "yes"}, "MEGATRON_EXT_BUILD_CUDA is 'yes'; it must be 0, 1"),
        (
            {"MEGATRON_EXT_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.x"},
            "TORCH_CUDA_ARCH_LIST has '9.x'; expected numbers such as 9.0 or 10.0+PTX",
        ),
    ],
)
def test_what_is_asked_for_and_cannot_be_built_is_an_error(
    tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    if "ARCH_LIST" in message and not HAS_NVCC:
        pytest.skip("needs a CUDA toolkit and a torch with CUDA")
    if environment.get("MEGATRON_EXT_BUILD_CUDA") == "1" and torch.version.cuda is None:
        pytest.skip("needs a torch with CUDA")
    built = build(tmp_path, **{"MEGATRON_EXT_BUILD_CPU": "0", **environment})
    assert built.returncode != 0
    assert message in built.output


@pytest.fixture(scope="module")
def isolated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What pip's isolated build has on PYTHONPATH: setuptools, and what hides all the rest."""
    folder = tmp_path_factory.mktemp("isolated")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.startswith(("setuptools", "_distutils_hack", "pkg_resources")):
            (folder / entry.name).symlink_to(entry)
    hide = "import sys\nsys.path[:] = [p for p in sys.path if not p.endswith('site-packages')]\n"
    (folder / "sitecustomize.py").write_text(hide)
    return folder


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment without torch."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


def wheel(
    directory: Path, python: str | Path, isolated: Path, **environment: str
) -> tuple[str, dict[str, str], str]:
    """The name of a wheel that is built in isolation, the record of its build, its metadata."""
    source = directory / "source"
    for name in ("megatron_ext", "csrc"):
        ignored = shutil.ignore_patterns("*.so", "build.json", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(directory)!r})"
    done = subprocess.run(
        [python, "-c", code],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(isolated), "PYTHONNOUSERSITE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = directory.glob("*.whl")
    with zipfile.ZipFile(found) as archive:
        record = json.loads(archive.read("megatron_ext/_ops/build.json"))
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        return found.name, record, archive.read(metadata).decode()


def test_a_wheel_without_kernels_says_so_in_its_name(
    isolated: Path, without_torch: Path, tmp_path: Path
) -> None:
    """The only line about a build that pip shows has the wheel's name."""
    name, record, metadata = wheel(tmp_path, without_torch, isolated)
    assert name == f"megatron_ext-{__version__}-0_without_kernels-py3-none-any.whl"
    assert record["cpu"] == (
        f"not built: no torch was installed for {without_torch}. Install torch, and then "
        "megatron_ext once more with the same command (uv needs --no-build-isolation)"
    )
    # The README is shown where there is no repository around it.
    targets = re.findall(r"\]\(([^)]*)\)", metadata)
    assert len(targets) > 1
    assert [t for t in targets if not t.startswith(("https://", "#"))] == []
    assert "# megatron_ext\n" in metadata


def test_an_isolated_build_finds_the_torch_of_its_environment(
    isolated: Path, tmp_path: Path
) -> None:
    compiler = tmp_path / "compiler"  # makes empty files
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n: > "$2"\n')
    compiler.chmod(0o755)
    name, record, _ = wheel(
        tmp_path, sys.executable, isolated, CXX=str(compiler), MEGATRON_EXT_BUILD_CUDA="0"
    )
    assert name == f"megatron_ext-{__version__}-py3-none-linux_{platform.machine()}.whl"
    assert record["cpu"] == f"built for torch >= 2.10 against torch {torch.__version__}"


def test_a_torch_for_rocm_is_named(tmp_path: Path) -> None:
    torch_ = tmp_path / "torch"
    torch_.mkdir()
    (torch_ / "__init__.py").touch()
    (torch_ / "version.py").write_text(
        "__version__ = '2.10.0+rocm6.4'\ncuda: Optional[str] = None\n"
        "hip: Optional[str] = '6.4.43482'\n"
    )
    built = build(tmp_path, MEGATRON_EXT_BUILD_CPU="0", PYTHONPATH=str(tmp_path))
    assert built.record["cuda"] == (
        "not built: torch 2.10.0+rocm6.4 is built with ROCm 6.4.43482, for which there is no "
        "compiled kernel"
    )


def env(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_ext", "env", "--json"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_compiled_kernel_serves_and_says_why() -> None:
    ((_, native, reason), *_) = kernels(ROOT)
    assert native
    assert reason.startswith("built for torch >= 2.10 against torch")


def test_the_reference_serves_where_it_is_asked_for() -> None:
    for device, native, reason in kernels(ROOT, MEGATRON_EXT_KERNEL="reference"):
        assert (native, reason) == (False, "MEGATRON_EXT_KERNEL=reference"), device


def kernels(directory: Path, **environment: str) -> list[tuple[str, bool, str]]:
    """Device, whether its kernel is compiled, and why; without importing Megatron as env does."""
    code = (
        "import json; from megatron_ext import _ops; print(json.dumps([(d, _ops.kernel(d).native, "
        "_ops.kernel(d).reason) for d in _ops.DEVICES]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=directory,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    return [tuple(kernel) for kernel in json.loads(done.stdout)]


def test_a_kernel_that_is_asked_for_and_missing_is_an_error(tmp_path: Path) -> None:
    # The package without what was built.
    copy = tmp_path / "megatron_ext"
    shutil.copytree(
        ROOT / "megatron_ext", copy, ignore=shutil.ignore_patterns("*.so", "build.json")
    )
    done = subprocess.run(
        [sys.executable, "-m", "megatron_ext", "env", "--json"],
        cwd=tmp_path,
        env={**os.environ, "MEGATRON_EXT_KERNEL": "native", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "MEGATRON_EXT_KERNEL=native, but there are no compiled kernels" in done.stderr
    assert "cpu: not built" in done.stderr
    found = kernels(tmp_path, MEGATRON_EXT_KERNEL="auto", PYTHONPATH=str(tmp_path))
    assert [native for _, native, _ in found] == [False, False]


def test_another_value_is_an_error() -> None:
    done = env(MEGATRON_EXT_KERNEL="fast")
    assert done.returncode == 2
    assert "MEGATRON_EXT_KERNEL is 'fast'; it must be auto, native or reference" in done.stderr
