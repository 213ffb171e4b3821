"""Convert a `ParameterMap` from and to plain data."""

from __future__ import annotations

from typing import Any

from .checks import listed, mapping, strings, text
from .parameter_map import Copy, ParameterMap
from .schema import CopyDocument, ParametersDocument


def parameters_from(found: Any) -> ParameterMap:
    """Build a parameter map from plain data.

    Raises:
        PolicyError: The data is not a parameter map. The error names the place.
    """
    content = mapping(found, "parameters", ParametersDocument)
    copies = []
    for i, one in enumerate(listed(content.get("copies", ()), "parameters.copies")):
        place = f"parameters.copies[{i}]"
        copy = mapping(one, place, CopyDocument)
        to, source = (text(copy.get(key, ""), f"{place}.{key}") for key in ("to", "from"))
        copies.append(Copy(to, source, copy.get("state", "all")))
    return ParameterMap(
        strings(content.get("new", ()), "parameters.new"),
        strings(content.get("drop", ()), "parameters.drop"),
        tuple(copies),
    )


def parameters_content(parameters: ParameterMap) -> ParametersDocument:
    """Write a parameter map as plain data; defaults are left out."""
    out: ParametersDocument = {}
    if parameters.new:
        out["new"] = list(parameters.new)
    if parameters.drop:
        out["drop"] = list(parameters.drop)
    if parameters.copies:
        out["copies"] = [
            {"to": c.to, "from": c.source, "state": c.state} for c in parameters.copies
        ]
    return out
