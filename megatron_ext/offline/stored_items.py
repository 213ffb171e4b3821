"""Read the items of a checkpoint once, compare their CRC32, and yield the elements of tensors."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from typing import BinaryIO

import torch

from ..checkpoint import checksums, torch_file
from ..checkpoint.placeholders import TensorPlace, row_major

#: Elements that are read at once.
_ELEMENTS = 2 << 20


def tensor_parts(file: BinaryIO, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Yield the elements of a stored tensor in their order, and compare the item's CRC32.

    Args:
        file: The item.
        shape: The shape that the index gives it.

    Yields:
        Flat parts in the stored dtype. Parts of two tensors of one shape have the same sizes.

    Raises:
        Exception: A damaged file may raise any exception. A wrong CRC32 of the elements raises it
            after the last part.
    """
    place = torch_file.find_tensor(file)
    count = math.prod(shape)
    if math.prod(place.shape) != count:
        raise ValueError(f"a tensor of the shape {place.shape}; the index says {shape}")
    if not _in_order(place):
        checksums.require_sums(file)
        yield from _as_strided(file, place)
        return
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            elements = entry.file_size == count * place.dtype.itemsize and count
            if elements and "/data/" in entry.filename:
                size = _ELEMENTS * place.dtype.itemsize
                for part in checksums.parts(archive, entry, size):
                    yield torch.frombuffer(bytearray(part), dtype=place.dtype)
            else:
                for _ in checksums.parts(archive, entry):
                    pass


def _in_order(place: TensorPlace) -> bool:
    """Whether the tensor is its whole storage in row-major order."""
    shape = place.shape
    strides = zip(shape, place.stride, row_major(shape), strict=True)
    whole = place.end - place.start == math.prod(shape) * place.dtype.itemsize
    return whole and all(size <= 1 or stride == want for size, stride, want in strides)


def _as_strided(file: BinaryIO, place: TensorPlace) -> Iterator[torch.Tensor]:
    """Yield the elements of a view of a storage. Megatron writes none; its storage fits memory."""
    file.seek(place.start)
    data = bytearray(file.read(place.end - place.start))
    flat = torch.frombuffer(data, dtype=place.dtype)
    yield from flat.as_strided(place.shape, place.stride).reshape(-1).split(_ELEMENTS)


def storage_parts(file: BinaryIO) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the elements of all tensors of any ``torch.save`` file, and compare its CRC32.

    Args:
        file: A legacy file, or an item that is an object.

    Yields:
        The path of the tensor in the object, such as ``optimizer.state.0.exp_avg``, and a flat
        part of its storage.

    Raises:
        Exception: A damaged file may raise any exception.
    """
    tensors = torch_file.tensors_of(file)
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            path, dtype = tensors.get(entry.filename.partition("/")[2], ("", None))
            size = 1 if dtype is None else dtype.itemsize
            for part in checksums.parts(archive, entry, _ELEMENTS * size):
                if dtype is not None and len(part) % size == 0:
                    yield path, torch.frombuffer(bytearray(part), dtype=dtype)
