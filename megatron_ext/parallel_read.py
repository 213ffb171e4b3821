"""A file of ``torch.save``, read into host memory by several threads where that helps.

``torch.load`` reads one storage after the other in one thread. Legacy checkpoints have all of the
optimizer's parameter state in one file, which one rank reads while the others wait for it. What the
kernel has in its page cache is copied faster by several threads; what comes from a disk is read in
order by one, as ``torch.load`` does, which is when reading ahead works best.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch

_THREADS = 4
_BYTES_AT_A_TIME = 4 << 20
#: Parts of a file that are asked for, to know whether it is in the page cache.
_PROBES = 32


class _Storage(NamedTuple):
    """The bytes of a storage.

    Args:
        memory: Where they are to be.
        offset: Where they lie in the file.
    """

    memory: torch.Tensor
    offset: int


class _NotPlain(Exception):
    """Left to ``torch.load``, whose errors are the errors."""


def load(path: str) -> Any:
    """What ``torch.load(path, map_location="cpu")`` gives, with new memory for every storage.

    Args:
        path: A file of ``torch.save``.

    Raises:
        Exception: Whatever ``torch.load`` raises for a file that it cannot read, or that holds more
            than tensors and plain values (``weights_only``).
    """
    with contextlib.suppress(_NotPlain):
        return _load(path)
    return torch.load(path, map_location="cpu")


def _load(path: str) -> Any:
    try:
        # Only where the elements are: torch/serialization.py, load_tensor, 2.15.
        places = torch.load(path, map_location="meta")
    except Exception as e:  # a foreign byte order too
        raise _NotPlain from e
    storages: dict[int, _Storage] = {}
    state = _fill_in(places, storages)
    _read_storages(path, storages.values())
    return state


def _read_storages(path: str, storages: Iterable[_Storage]) -> None:
    parts = [part for storage in storages for part in _parts(storage)]
    threads = min(_THREADS, len(os.sched_getaffinity(0))) if _is_cached(path, parts) else 1
    each = -(-len(parts) // threads) or 1
    # One stretch of the file and one descriptor a thread: what is read ahead is kept by descriptor.
    stretches = [parts[i : i + each] for i in range(0, len(parts), each)]
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(lambda stretch: _read_stretch(path, stretch), stretches):
            pass


def _is_cached(path: str, parts: Sequence[tuple[memoryview, int]]) -> bool:
    """Whether some bytes all over a file can be read without waiting for a disk."""
    file = os.open(path, os.O_RDONLY)
    try:
        for _, offset in parts[:: -(-len(parts) // _PROBES) or 1]:
            os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT)
    except OSError:  # it would wait, or the file system cannot tell
        return False
    finally:
        os.close(file)
    return True


def _read_stretch(path: str, parts: Sequence[tuple[memoryview, int]]) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        for part, offset in parts:
            _read(file, part, offset)
    finally:
        os.close(file)


def _fill_in(value: Any, storages: dict[int, _Storage]) -> Any:
    """The same with tensors in host memory for those without elements.

    Args:
        value: Dicts, lists and tuples of tensors on the meta device and plain values.
        storages: Is given every storage that a tensor refers to.
    """
    if isinstance(value, torch.Tensor):
        if type(value) is not torch.Tensor or value.is_quantized or value.layout != torch.strided:
            raise _NotPlain
        storage = value.untyped_storage()
        key = storage._cdata
        if key not in storages:
            offset = getattr(storage, "_checkpoint_offset", None)
            if offset is None:
                raise _NotPlain
            storages[key] = _Storage(torch.empty(storage.nbytes(), dtype=torch.uint8), offset)
        target = torch.empty(0, dtype=value.dtype)
        begin = value.storage_offset()
        target.set_(storages[key].memory.untyped_storage(), begin, value.shape, value.stride())
        return target.requires_grad_(value.requires_grad)
    if type(value) is dict:
        return {k: _fill_in(v, storages) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_fill_in(v, storages) for v in value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    raise _NotPlain


def _parts(storage: _Storage) -> Iterator[tuple[memoryview, int]]:
    """Memory to be filled, and where its bytes lie in the file."""
    data = memoryview(storage.memory.numpy())
    for begin in range(0, len(data), _BYTES_AT_A_TIME):
        yield data[begin : begin + _BYTES_AT_A_TIME], storage.offset + begin


def _read(file: int, into: memoryview, offset: int) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(file, [into[done:]], offset + done)
        if not count:
            raise _NotPlain
        done += count
