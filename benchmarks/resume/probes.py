"""What is measured around a piece of work: time, peak memory, bytes read, collectives, copies."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "broadcast",
    "broadcast_object_list",
    "reduce_scatter_tensor",
    "gather",
    "gather_object",
    "scatter",
    "scatter_object_list",
    "barrier",
)


@dataclass
class Sample:
    """What one resume took on one rank.

    Args:
        seconds: Of each part.
        peak: Bytes above what the process held before the resume, by part; host memory.
        device_peak: The same of device memory; empty without a GPU.
        payload: Bytes of the tensors that were read: elements times bytes an element.
        stored: What the files spend on them.
        collectives: Name -> how often, and bytes this rank puts in, by part; where `count` is set.
        count: Whether collectives are counted.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    device_peak: dict[str, int] = field(default_factory=dict)
    payload: int = 0
    stored: int = 0
    collectives: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    count: bool = False
    _base: tuple[int, int] = (0, 0)

    def begin(self) -> None:
        """Take the memory of now for what was held before."""
        gc.collect()
        _trim()
        device = torch.cuda.memory_allocated() if _cuda() else 0
        self._base = (_resident(), device)

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Measure what is done inside; the parts of one name add up."""
        counts: dict[str, tuple[int, int]] = {}
        _reset_peak()
        if dist.is_initialized():
            dist.barrier()
        with _counting(counts) if self.count else contextlib.nullcontext():
            _synchronize()
            begin = time.perf_counter()
            yield
            _synchronize()
            seconds = time.perf_counter() - begin
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.peak[name] = max(self.peak.get(name, 0), _peak() - self._base[0])
        if _cuda():
            self.device_peak[name] = torch.cuda.max_memory_allocated() - self._base[1]
        self.collectives[name] = counts

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {k: v for k, v in asdict(self).items() if not k.startswith("_")}


@contextlib.contextmanager
def reads(sample: Sample) -> Iterator[None]:
    """Count what a load asks of a distributed checkpoint's files, and of torch.load."""
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.planner import LoadItemType

    finish_plan, load = DefaultLoadPlanner.finish_plan, torch.load

    def counting(self: Any, plan: Any) -> Any:
        for item in plan.items:
            if item.type == LoadItemType.TENSOR:
                entry = self.metadata.state_dict_metadata[item.storage_index.fqn]
                sample.payload += math.prod(item.lengths) * entry.properties.dtype.itemsize
                sample.stored += self.metadata.storage_data[item.storage_index].length
        return finish_plan(self, plan)

    @functools.wraps(load)
    def loading(file: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = load(file, *args, **kwargs)
        if isinstance(file, str | Path):
            sample.stored += Path(file).stat().st_size
            sample.payload += _tensor_bytes(loaded)
        return loaded

    DefaultLoadPlanner.finish_plan = counting  # type: ignore[method-assign]
    torch.load = loading
    try:
        yield
    finally:
        DefaultLoadPlanner.finish_plan = finish_plan  # type: ignore[method-assign]
        torch.load = load


@contextlib.contextmanager
def timed(owner: Any, name: str, sample: Sample, part: str) -> Iterator[None]:
    """Also measure the calls of one function."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def measured(*args: Any, **kwargs: Any) -> Any:
        _synchronize()
        begin = time.perf_counter()
        result = original(*args, **kwargs)
        _synchronize()
        sample.seconds[part] = sample.seconds.get(part, 0.0) + time.perf_counter() - begin
        return result

    setattr(owner, name, measured)
    try:
        yield
    finally:
        setattr(owner, name, original)


def drop_from_cache(directory: Path) -> None:
    """Let the kernel forget the pages of a checkpoint's files; they are on disk."""
    for file in directory.rglob("*"):
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


@contextlib.contextmanager
def _counting(counts: dict[str, tuple[int, int]]) -> Iterator[None]:
    before = {name: getattr(dist, name) for name in _COLLECTIVES}

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls, size = counts.get(name, (0, 0))
            counts[name] = (calls + 1, size + _bytes(name, args))
            return original(*args, **kwargs)

        return counted

    for name, original in before.items():
        setattr(dist, name, wrap(name, original))
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(dist, name, original)


def _bytes(name: str, args: tuple[Any, ...]) -> int:
    """What this rank puts in."""
    if name.endswith("object"):
        return len(pickle.dumps(args[0 if name == "gather_object" else 1]))
    second = name in ("all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")
    given = args[int(second)] if len(args) > int(second) else None
    return given.numel() * given.element_size() if isinstance(given, torch.Tensor) else 0


def _tensor_bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_tensor_bytes, value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def _cuda() -> bool:
    """Whether a real GPU is used; `megatron_ext.cpu` stands in for CUDA where there is none."""
    return "nccl" in str(dist.get_backend()) if dist.is_initialized() else False


def _synchronize() -> None:
    if _cuda():
        torch.cuda.synchronize()


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _reset_peak() -> None:
    # 5: reset the peak resident set size (proc(5), /proc/pid/clear_refs).
    Path("/proc/self/clear_refs").write_text("5")
    if _cuda():
        torch.cuda.reset_peak_memory_stats()


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def _trim() -> None:
    """Give freed memory back, so that a resume does not begin with another one's."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
