"""The versions of the packages that this process imports, and where they come from.

The metadata of an installed distribution say nothing about a checkout that comes before it on
Python's path, or that is there alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from ..errors import HostError
from ..host import megatron

_UNKNOWN = "present, version unknown"


@dataclass(frozen=True)
class Imported:
    """A package as it is imported.

    Args:
        version: Its version, or a text if it states none; None if it is not there.
        path: The folder that it is imported from.
        difference: How the installed distribution of its name differs; None if it does not.
    """

    version: str | None
    path: str | None
    difference: str | None = None


def imported(distribution: str) -> Imported:
    """Find a package by the name of its distribution. Imports it, except for Megatron.

    Args:
        distribution: ``megatron-core``, ``torch`` and so on.
    """
    installed = _installed(distribution)
    version, path = _found(distribution)
    if path is None:
        return Imported(None, None)
    if version is None:
        return Imported(installed or _UNKNOWN, path)
    if installed is None or _public(installed) == _public(version):
        return Imported(version, path)
    return Imported(
        version,
        path,
        f"{distribution} {version} is imported from {path}, but the installed distribution is "
        f"{installed}. Uninstall that one, or take {path} off Python's path",
    )


def _found(distribution: str) -> tuple[str | None, str | None]:
    """Return the version that the package itself states, and its folder."""
    if distribution == "megatron-core":
        try:
            copy = megatron.find()
        except HostError:
            return None, None
        return str(copy.version), str(copy.root)
    name = distribution.replace("-", "_")
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None, None
    places = [*(spec.submodule_search_locations or ()), spec.origin or ""]
    try:
        version = getattr(importlib.import_module(name), "__version__", None)
    except Exception:  # a broken installation is a finding of its own
        version = None
    return None if version is None else str(version), str(Path(places[0]).parent)


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _public(version: str) -> str:
    """Return a version without its local part, such as +cu130."""
    try:
        return Version(version).public
    except InvalidVersion:
        return version
