"""Find the copy of Megatron that this process imports, without importing it.

Only its files are asked. The metadata of installed distributions belongs to the wheel in
site-packages, also where a checkout on ``PYTHONPATH`` or beside the script comes before it.
"""

from __future__ import annotations

import functools
import importlib.util
import runpy
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from ..errors import HostError

#: Where Megatron states its version, in every copy since 0.3.
_PACKAGE_INFO = Path("megatron/core/package_info.py")


@dataclass(frozen=True)
class Megatron:
    """One copy of Megatron.

    Args:
        version: Its version, without the local part.
        root: The folder that contains ``megatron/core``.
    """

    version: Version
    root: Path


def find() -> Megatron:
    """Find the copy from which ``megatron.core`` is, or would be, imported.

    Raises:
        HostError: There is none.
    """
    root = _root("megatron.core")
    if root is None or not (root / _PACKAGE_INFO).is_file():
        raise HostError(
            f"found no Megatron: no folder on Python's path has {_PACKAGE_INFO}. Install "
            "megatron-core (pip install 'megatron_ext[megatron]'), or put the folder of a "
            "Megatron-LM checkout on the path (PYTHONPATH=/path/to/Megatron-LM)"
        )
    return Megatron(_version(root / _PACKAGE_INFO), root)


def require_one_copy() -> None:
    """Require that ``megatron.core`` and ``megatron.training`` come from the same folder.

    ``megatron`` is a namespace package: what a copy lacks is taken from the next one on the path.

    Raises:
        HostError: They come from different folders.
    """
    core, training = _root("megatron.core"), _root("megatron.training")
    if core and training and core.resolve() != training.resolve():
        raise HostError(
            f"two copies of Megatron are mixed: megatron.core is found in {core}, "
            f"megatron.training in {training}. Both must come from one folder: put a complete "
            "Megatron-LM checkout first on PYTHONPATH, or take one of these two folders off "
            "Python's path: the script's folder, PYTHONPATH, installed packages, the current folder"
        )


def _root(package: str) -> Path | None:
    """Return the folder that contains ``megatron/...``; None if the package is not there."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # there is no megatron at all
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]).parents[1] if places else None


@functools.cache
def _version(package_info: Path) -> Version:
    """Read the version that Megatron itself states.

    The local part is dropped: upstream appends the commit of a git checkout.
    """
    return Version(Version(runpy.run_path(str(package_info))["__version__"]).public)
