"""Find every stored record of a checkpoint without the package, and flip bits in it."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Record(NamedTuple):
    """A record of a ``torch.save`` archive: the file, the item's key and place, and its bytes."""

    path: Path
    key: str
    item: int
    name: str
    begin: int
    size: int


def records(directory: Path) -> Iterator[Record]:
    """Every record of every item below the directory of an iteration."""
    for path in sorted(directory.rglob("*.pt")):
        yield from _of_archive(path, "", 0, path.read_bytes())
    index = directory / ".metadata"
    if not index.is_file():
        return
    for item, info in pickle.loads(index.read_bytes()).storage_data.items():
        path = directory / info.relative_path
        data = path.read_bytes()[info.offset : info.offset + info.length]
        yield from _of_archive(path, item.fqn, info.offset, data)


def _of_archive(path: Path, key: str, at: int, data: bytes) -> Iterator[Record]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        for entry in archive.infolist():
            name, extra = struct.unpack_from("<HH", data, entry.header_offset + 26)
            begin = at + entry.header_offset + 30 + name + extra
            if entry.file_size:
                yield Record(path, key, at, entry.filename, begin, entry.file_size)


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Invert a bit of a file; twice gives the file back."""
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))
