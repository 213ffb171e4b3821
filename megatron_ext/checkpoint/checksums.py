"""Check the CRC32 that ``torch.save`` stores for every record of a file.

torch itself does not compare it: it builds its zip reader with
``MINIZ_DISABLE_ZIP_READER_CRC32_CHECKS`` (caffe2/serialize/CMakeLists.txt). Python's zipfile does.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from .torch_file import window

#: Bytes that are read at once.
PART = 8 << 20


def require_sums(file: BinaryIO) -> None:
    """Read a whole ``torch.save`` file in parts, and compare the CRC32 of every record.

    Args:
        file: In the zip format, not compressed, as torch writes it; seekable.

    Raises:
        Exception: A damaged file may raise any exception.
    """
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            for _ in parts(archive, entry):
                pass


def require_item_sums(file: BinaryIO, place: Any) -> None:
    """Compare the CRC32 of every record of one item in a file of the store.

    Args:
        file: The open file.
        place: An entry of the index's ``storage_data``.

    Raises:
        Exception: A damaged item may raise any exception.
    """
    require_sums(window(file, place.offset, place.length))


def parts(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, size: int = PART) -> Iterator[bytes]:
    """Yield a record in parts, and compare its CRC32 with the last of them.

    Args:
        archive: The opened file.
        entry: The record.
        size: Bytes of a part.

    Raises:
        UnpicklingError: The record is compressed.
        EOFError: It is shorter than the file says.
        BadZipFile: The CRC32 differs.
    """
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise pickle.UnpicklingError(f"the record {entry.filename} is compressed")
    left = entry.file_size
    with archive.open(entry) as record:
        while left > 0:
            part = record.read(min(size, left))
            if not part:
                raise EOFError(f"the record {entry.filename} lacks its last {left} bytes")
            left -= len(part)
            yield part
