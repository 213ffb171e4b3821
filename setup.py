"""Build entry point: metadata is in pyproject.toml, here are the kernels of csrc/.

The CPU kernels are built where there is a compiler and torch, the CUDA kernels where there also
are a CUDA toolkit (no GPU is needed) and a CUDA build of torch. What cannot be built is left out,
and the package works on its reference kernels; ``python -m megatron_ext env`` says why.

Environment:
    MEGATRON_EXT_BUILD_CPU, MEGATRON_EXT_BUILD_CUDA: ``auto`` (default), ``0``, or ``1``: an error
        where it cannot be built.
    CUDA_HOME: the CUDA toolkit (default: the one nvcc on the PATH belongs to).
    TORCH_CUDA_ARCH_LIST: default ``8.0 9.0 10.0+PTX``.
    MAX_JOBS: compilers at once (default: the number of CPUs).
    CXX: the C++ compiler (default: c++).

The kernels use torch's stable ABI: they are shared libraries without Python, and torch is only
needed for its headers. It is found in the environment that is built for, also from within pip's
isolated build.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = Path("csrc")
OPS = "megatron_ext._ops"
SOURCES = {
    "cpu": [
        "read_table.cpp",
        "cpu/loops_baseline.cpp",
        "cpu/loops_avx2.cpp",
        "cpu/loops_avx512.cpp",
        "cpu/ops.cpp",
    ],
    "cuda": [
        "read_table.cpp",
        "cuda/ops.cpp",
        "cuda/transform.cu",
        "cuda/compare.cu",
        "cuda/histogram.cu",
    ],
}
#: The oldest torch that the libraries can be loaded into: 2.10.
TORCH_TARGET_VERSION = "0x020A000000000000"
ARCHITECTURES = "8.0 9.0 10.0+PTX"
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"),
    # Every operation is rounded by itself, as the reference kernel does.
    *("-ffp-contract=off", "-fopenmp-simd", "-fno-math-errno"),
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
]
NVCC_FLAGS = [
    *("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Werror=all-warnings"),
    *("-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra",),
]


FIND_TORCH = (
    "import importlib.util as u; found = u.find_spec('torch'); print(found.origin if found else '')"
)


class Impossible(Exception):
    """Why a library cannot be built here."""


class Torch:
    """The torch that is built against: headers, libraries and version, without importing it."""

    def __init__(self) -> None:
        self.root = self._find()
        text = (self.root / "version.py").read_text()
        self.version = re.search(r"__version__ = ['\"]([^'\"]+)", text)[1]
        found = re.search(r"^cuda(?:: [^=]+)? = ['\"]([^'\"]+)", text, re.MULTILINE)
        self.cuda = found[1] if found else None
        found = re.search(r"^hip(?:: [^=]+)? = ['\"]([^'\"]+)", text, re.MULTILINE)
        self.hip = found[1] if found else None
        if tuple(int(n) for n in self.version.split(".")[:2]) < (2, 10):
            raise Impossible(f"torch {self.version} is older than 2.10")

    @staticmethod
    def _find() -> Path:
        spec = importlib.util.find_spec("torch")
        if spec is not None and spec.origin is not None:
            return Path(spec.origin).parent
        # pip's isolated build hides the environment's packages; its interpreter knows them.
        hiding = ("PYTHONPATH", "PYTHONNOUSERSITE")
        done = subprocess.run(
            [sys.executable, "-c", FIND_TORCH],
            cwd=os.sep,
            env={k: v for k, v in os.environ.items() if k not in hiding},
            capture_output=True,
            text=True,
        )
        if origin := done.stdout.strip():
            return Path(origin).parent
        raise Impossible(
            f"no torch was installed for {sys.executable}. Install torch, and then megatron_ext "
            "once more with the same command (uv needs --no-build-isolation)"
        )

    def flags(self) -> list[str]:
        include = self.root / "include"
        return [f"-isystem{include}", f"-isystem{include / 'torch/csrc/api/include'}"]

    def link(self, *libraries: str) -> list[str]:
        return [f"-L{self.root / 'lib'}", *(f"-l{name}" for name in libraries)]


class Toolkit:
    """The CUDA toolkit."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME")
        self.root = Path(home) if home else self._find()
        self.nvcc = self.root / "bin" / "nvcc"
        if not self.nvcc.exists():
            raise Impossible(f"no nvcc in {self.root / 'bin'}")
        out = subprocess.run([self.nvcc, "--version"], capture_output=True, text=True, check=True)
        self.version = re.search(r"release (\d+\.\d+)", out.stdout)[1]

    @staticmethod
    def _find() -> Path:
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise Impossible("no CUDA toolkit: CUDA_HOME is not set and nvcc is not on the PATH")
        # nvcc may be a script that calls the real one: only nvcc itself knows where it lies.
        out = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
        )
        found = re.search(r"^#\$ _HERE_=(.+)$", out.stderr + out.stdout, re.MULTILINE)
        return Path(found[1]).parent if found else Path(nvcc).resolve().parent.parent

    def architectures(self) -> list[str]:
        """The -gencode flags of TORCH_CUDA_ARCH_LIST."""
        flags = []
        for entry in re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES):
            found = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
            if found is None:
                raise Impossible(
                    f"TORCH_CUDA_ARCH_LIST has {entry!r}; expected numbers such as 9.0 or 10.0+PTX"
                )
            name = found[1] + found[2] + found[3]
            flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
            if found[4]:
                flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
        return flags


def wanted(device: str) -> str:
    name = f"MEGATRON_EXT_BUILD_{device.upper()}"
    value = os.environ.get(name, "auto")
    if value not in ("0", "1", "auto"):
        sys.exit(f"{name} is {value!r}; it must be 0, 1 or auto")
    return value


class Build(build_ext):
    """Builds the two libraries, or writes down why it did not."""

    def run(self) -> None:
        record = {}
        for extension in self.extensions:
            device = extension.name.rsplit("_", 1)[1]
            record[device] = self._try(device, extension)
            print(f"megatron_ext: {device} kernels: {record[device]}")
        target = Path(self._directory()) / "build.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(record, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        made = [Path(self.get_ext_fullpath(e.name)) for e in self.extensions]
        made.append(Path(self._directory()) / "build.json")
        return [str(p) for p in made if p.exists()]

    def get_ext_filename(self, fullname: str) -> str:
        # Not a Python module: the name says nothing of an interpreter.
        return fullname.replace(".", os.sep) + ".so"

    def _directory(self) -> str:
        return os.path.dirname(self.get_ext_fullpath(self.extensions[0].name))

    def _try(self, device: str, extension: Extension) -> str:
        want = wanted(device)
        target = Path(self.get_ext_fullpath(extension.name))
        target.unlink(missing_ok=True)
        if want == "0":
            return f"not built: MEGATRON_EXT_BUILD_{device.upper()}=0"
        try:
            return self._build(device, extension, target)
        except Impossible as e:
            if want == "1":
                sys.exit(f"MEGATRON_EXT_BUILD_{device.upper()}=1, but: {e}")
            return f"not built: {e}"

    def _build(self, device: str, extension: Extension, target: Path) -> str:
        compiler = os.environ.get("CXX", "c++").split()
        if shutil.which(compiler[0]) is None:
            raise Impossible(f"no C++ compiler: {compiler[0]} is not on the PATH")
        torch = Torch()
        made = f"built for torch >= 2.10 against torch {torch.version}"
        cxx = [*compiler, *CXX_FLAGS, *torch.flags()]
        if device == "cpu":
            compile_ = {".cpp": cxx}
            link = torch.link("torch_cpu")
        else:
            if torch.cuda is None:
                raise Impossible(
                    f"torch {torch.version} is built with ROCm {torch.hip}, for which there is no "
                    "compiled kernel"
                    if torch.hip
                    else f"torch {torch.version} is built without CUDA"
                )
            toolkit = Toolkit()
            if torch.cuda.split(".")[0] != toolkit.version.split(".")[0]:
                raise Impossible(
                    f"torch is built with CUDA {torch.cuda}, the toolkit in {toolkit.root} is "
                    f"{toolkit.version}"
                )
            architectures = toolkit.architectures()
            made += f", CUDA {toolkit.version}, {' '.join(architectures).replace('-gencode=', '')}"
            compile_ = {
                ".cpp": [*cxx, "-DUSE_CUDA", f"-isystem{toolkit.root / 'include'}"],
                ".cu": [toolkit.nvcc, *NVCC_FLAGS, "-ccbin", *compiler[:1], *architectures],
            }
            lib = next(d for d in ("lib64", "lib") if (toolkit.root / d).is_dir())
            # The static runtime: it is the toolkit's, whatever runtime torch has brought along.
            link = [
                *torch.link("torch_cpu", "torch_cuda"),
                *(f"-L{toolkit.root / lib}", "-lcudart_static", "-lpthread", "-ldl", "-lrt"),
            ]
        self._compile_and_link(device, extension, compiler, compile_, link, target)
        return made

    def _compile_and_link(
        self,
        device: str,
        extension: Extension,
        compiler: list[str],
        compile_: dict[str, list[str]],
        link: list[str],
        target: Path,
    ) -> None:
        temporary = Path(self.build_temp) / device
        temporary.mkdir(parents=True, exist_ok=True)
        objects = []
        commands = []
        for source in extension.sources:
            path = Path(source)
            objects.append(str(temporary / (path.name + ".o")))
            commands.append([*compile_[path.suffix], "-c", source, "-o", objects[-1]])
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        with ThreadPoolExecutor(max(jobs, 1)) as pool:
            logs = list(pool.map(_run, commands))
        (temporary / "compile.log").write_text("\n".join(logs))
        target.parent.mkdir(parents=True, exist_ok=True)
        hide = "-Wl,--exclude-libs,ALL"
        _run([*compiler, "-shared", *objects, *link, hide, "-o", str(target)])


def _run(command: list[object]) -> str:
    words = [str(w) for w in command]
    done = subprocess.run(words, capture_output=True, text=True)
    log = f"$ {' '.join(words)}\n{done.stdout}{done.stderr}"
    if done.returncode:
        print(log, file=sys.stderr)
        raise Impossible(
            f"{words[0]} failed on {words[-3]} with exit status {done.returncode}"
            f"{_first_error(done.stdout + done.stderr)}"
        )
    return log


def _first_error(output: str) -> str:
    """The first line in which a compiler or linker says what is wrong; empty if there is none."""
    for line in output.splitlines():
        if re.search(r"\berror\b|undefined reference|cannot find", line):
            return f": {line.strip()[:300]}"
    return ""


class Wheel(bdist_wheel):
    """The libraries hold no Python: one wheel serves every version of it.

    Without libraries it serves every platform. pip shows nothing of a build but the wheel's name,
    so that the name says it.
    """

    def run(self) -> None:
        self.run_command("build_ext")
        if not self._has_kernels():
            self.build_number = "0_without_kernels"
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform if self._has_kernels() else "any"

    def _has_kernels(self) -> bool:
        build = self.get_finalized_command("build_ext")
        return any(Path(build.get_ext_fullpath(e.name)).exists() for e in build.extensions)


def long_description() -> str:
    """The README without pictures and links of the repository, which lead nowhere elsewhere."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^\]]*\]\((?!https?:)[^)]*\)\n*", "", text)
    return re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", text)


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    ext_modules=[
        Extension(
            f"{OPS}._{device}",
            sources=[str(CSRC / name) for name in names],
            depends=[str(p.relative_to(ROOT)) for p in (ROOT / CSRC).rglob("*.*h")],
        )
        for device, names in SOURCES.items()
    ],
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
