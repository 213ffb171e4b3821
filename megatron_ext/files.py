"""A text file that is replaced as a whole."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace(target: Path, text: str) -> None:
    """Write a file in one go, or leave the one that is there.

    Args:
        target: The file; readable for all.
        text: Its content without the last newline.
    """
    fd, name = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    with os.fdopen(fd, "w", encoding="utf-8") as stream:
        stream.write(text + "\n")
    Path(name).chmod(0o644)
    Path(name).replace(target)
