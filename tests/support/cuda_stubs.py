"""Empty libraries in the place of CUDA's, so that a torch built for another CUDA can be imported.

Every function returns 0. A machine without a GPU calls none of them but those that register
kernels.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

_OF_CUDA = re.compile(r"lib(cu|nv|nccl)")
_FUNCTION_OF_CUDA = re.compile(r"(__cuda|cu[a-zA-Z]|nccl|nv)")
#: Takes the functions that no version says the library of.
_ANY = "libcudart.so"


def make_stubs(torch_lib: Path, out: Path) -> list[str]:
    """Write a library for each one of CUDA that torch's libraries need and do not bring.

    Args:
        torch_lib: torch's ``lib`` directory.
        out: An empty directory, for LD_LIBRARY_PATH.

    Returns:
        The libraries' names.
    """
    libraries = sorted(torch_lib.glob("lib*.so*"))
    needed: set[str] = set()
    defined: set[str] = set()
    undefined: set[tuple[str, str]] = set()
    library_of: dict[str, str] = {}
    for path in libraries:
        needed |= set(re.findall(r"NEEDED.*\[(.+)\]", _run("readelf", "-d", path)))
        for part in _run("readelf", "--wide", "-V", path).split("File: ")[1:]:
            library_of |= dict.fromkeys(re.findall(r"Name: (\S+)", part), part.split()[0])
        defined |= {name for name, _ in _symbols(path, "defined")}
        undefined |= set(_symbols(path, "undefined"))
    stubs = {n for n in needed - {p.name for p in libraries} if _OF_CUDA.match(n)}
    rest = next(n for n in stubs if n.startswith(_ANY))
    functions: dict[str, dict[str, set[str]]] = {n: defaultdict(set) for n in stubs}
    for name, version in undefined:
        if library_of.get(version) in stubs:
            functions[library_of[version]][version].add(name)
        elif not version and name not in defined and _FUNCTION_OF_CUDA.match(name):
            functions[rest][""].add(name)
    for name, versions in functions.items():
        _write(out, name, versions)
    return sorted(stubs)


def _write(out: Path, library: str, versions: dict[str, set[str]]) -> None:
    lines = [".text", "stub:", "xor %eax, %eax", "ret"]
    for name in sorted(set().union(*versions.values())):
        lines += [f".globl {name}", f".type {name}, @function", f".set {name}, stub"]
    source, script = out / "stub.s", out / "stub.map"
    source.write_text("\n".join(lines) + "\n")
    script.write_text("".join(f"{v} {{ {'; '.join(n)}; }};\n" for v, n in versions.items() if v))
    more = [f"-Wl,--version-script={script}"] if any(versions) else []
    _run("cc", "-shared", "-nostdlib", source, f"-Wl,-soname,{library}", *more, "-o", out / library)


def _symbols(path: Path, which: str) -> list[tuple[str, str]]:
    """Names of symbols, each with its version."""
    found = _run("nm", "-D", f"--{which}-only", "--format=just-symbols", path).split()
    return [(name, version.lstrip("@")) for name, _, version in (s.partition("@") for s in found)]


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
