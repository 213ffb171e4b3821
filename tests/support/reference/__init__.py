"""The parts of the pages that say what the code says, as plain Markdown.

Each part stands between ``<!-- generated: NAME ARGUMENT ... -->`` and ``<!-- end -->`` and is
committed, so that a forge shows it. ``python -m tests.support.reference`` (``make reference``)
writes them anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ..pool import ROOT
from . import (
    command_line,
    compatibility,
    environment,
    listing,
    optimizers,
    policies,
    python_names,
    schemas,
)

DOCS = ROOT / "docs"

PARTS: Mapping[str, Callable[..., str]] = {
    "flags": command_line.flags,
    "launcher": command_line.launcher,
    "commands": command_line.commands,
    "environment": environment.environment,
    "presets": policies.presets,
    "operations": policies.operations,
    "formulas": policies.formulas,
    "rules": policies.rules,
    "optimizers": optimizers.optimizers,
    "policy-file": schemas.policy_file,
    "schemas": schemas.schemas,
    "names": python_names.names,
    "versions": compatibility.versions,
    "hosts": compatibility.hosts,
    "refused": compatibility.refused,
    "contract": compatibility.contract,
    "listing": listing.listing,
}

PART = re.compile(r"^<!-- generated: ([^\n]+) -->\n(.*?)^<!-- end -->$", re.DOTALL | re.MULTILINE)


def regenerated() -> dict[Path, str]:
    """Every page with a generated part -> its text, with the parts as the code has them now."""

    def part(found: re.Match[str]) -> str:
        name, *arguments = found[1].split()
        return f"<!-- generated: {found[1]} -->\n\n{PARTS[name](*arguments)}\n\n<!-- end -->"

    pages = {p: p.read_text() for p in sorted(DOCS.rglob("*.md")) if "_build" not in p.parts}
    return {path: PART.sub(part, text) for path, text in pages.items() if PART.search(text)}
