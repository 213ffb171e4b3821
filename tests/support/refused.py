"""Packages that a run must not import: every import raises, and ours leave a line in the log."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from typing import Any

import megatron_ext

#: What the page of a report is made with.
PAGE_PACKAGES = ("matplotlib", "jinja2")
OURS = os.path.join(os.path.dirname(os.path.abspath(megatron_ext.__file__)), "")


class Refused:
    """Stands before Python's own finders."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in PAGE_PACKAGES:
            return None
        importer = sys._getframe(1)
        while importer.f_back and "importlib" in importer.f_code.co_filename:
            importer = importer.f_back
        # torch imports Jinja2 where it is there. Of ours an except clause must not hide it.
        if importer.f_code.co_filename.startswith(OURS):
            print(f"REFUSED: import of {name} in {importer.f_code.co_filename}", flush=True)
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def refuse_page_packages() -> None:
    """Refuse every import of `PAGE_PACKAGES` in this process, also of what it has imported."""
    for name in [m for m in sys.modules if m.partition(".")[0] in PAGE_PACKAGES]:
        del sys.modules[name]
    sys.meta_path.insert(0, Refused())
