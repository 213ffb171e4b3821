"""What a rank of tests/project/test_package.py runs: it has torch and Megatron already."""

from __future__ import annotations

import megatron_ext


def public_names() -> dict[str, tuple[str, str]]:
    """Every public name -> its type's name and the module it was defined in."""
    found = {}
    for name in megatron_ext.__all__:
        value = getattr(megatron_ext, name)
        found[name] = (type(value).__name__, getattr(value, "__module__", ""))
    return found
