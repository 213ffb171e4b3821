"""What can become of a file: each function damages one in place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from .pool import ROOT


def empty(path: Path) -> None:
    path.write_bytes(b"")


def truncated(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def nearly_whole(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def foreign(path: Path) -> None:
    """Something else, as long as it was."""
    size = path.stat().st_size
    path.write_bytes((b"\x89PNG\r\n\x1a\n" * (size // 8 + 1))[:size])


def other_json(path: Path) -> None:
    path.write_text(json.dumps({"a": [1, 2]}))


def other_zip(path: Path) -> None:
    shutil.make_archive(str(path.parent / "other"), "zip", ROOT / "csrc")
    (path.parent / "other.zip").rename(path)


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": empty,
    "truncated": truncated,
    "without its last byte": nearly_whole,
    "another file": foreign,
    "other JSON": other_json,
    "another zip file": other_zip,
    "a directory": a_directory,
}
