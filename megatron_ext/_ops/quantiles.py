"""Compute quantiles of abs(x) by a radix select over histograms."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from . import reference
from . import schema as schema

#: Bytes of the tensors after which a batch ends.
BATCH = 1 << 26

#: A tensor, and begin, end and group of its ranges.
Part = tuple[torch.Tensor, Sequence[tuple[int, int, int]]]


def magnitude_thresholds(
    tensors: Sequence[torch.Tensor],
    ranges: torch.Tensor,
    quantiles: torch.Tensor,
    reduce: Callable[[torch.Tensor], object] | None = None,
) -> torch.Tensor:
    r"""Compute the p-quantile of abs(x) for each group of ranges, exactly and without sorting.

    A radix select with three histograms over the 31 bits of the fp32 magnitude finds the k-th
    smallest value for :math:`k = \lfloor p (n - 1) \rfloor`, which is numpy's ``method="lower"``.
    NaN counts as the largest value. The number of elements is not limited (most versions of
    torch.quantile accept at most 16M).

    Args:
        tensors: float32, bfloat16 or float16, contiguous, on one device.
        ranges: int64 ``[n, 4]`` on the CPU: tensor, begin, end, group.
        quantiles: float64 ``[groups]``, p of each group, in [0, 1].
        reduce: Sums a histogram (int64 ``[groups, 2048]``, 16 KiB per group) over the ranks, in
            place. It is called three times.

    Returns:
        float32 ``[groups]`` on the tensors' device; 0 for a group without elements.

    Raises:
        RuntimeError: A quantile is outside [0, 1], or an argument is invalid (see `.schema`).
    """
    device = tensors[0].device if tensors else torch.device("cpu")
    return _thresholds(lambda: [(tensors, ranges)], quantiles, device, reduce)


def magnitude_thresholds_of(
    parts: Callable[[], Iterable[Part]],
    quantiles: torch.Tensor,
    device: torch.device,
    reduce: Callable[[torch.Tensor], object] | None = None,
) -> torch.Tensor:
    """Compute the same of tensors that are made when they are read, a batch at a time.

    Args:
        parts: Makes the tensors. It is called three times.
        quantiles: As above.
        device: The device of the tensors.
        reduce: As above.
    """
    return _thresholds(lambda: _batches(parts()), quantiles, device, reduce)


def _batches(parts: Iterable[Part]) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """Cut tensors into batches. The list of one is empty as soon as the next is asked for."""
    tensors: list[torch.Tensor] = []
    ranges: list[list[int]] = []
    size = 0
    for tensor, of_tensor in parts:
        ranges += [[len(tensors), *r] for r in of_tensor]
        tensors.append(tensor)
        size += tensor.nbytes
        del tensor  # so that it is gone before the next one is made
        if size >= BATCH:
            yield tensors, torch.tensor(ranges, dtype=torch.int64).reshape(-1, 4)
            tensors.clear()
            ranges, size = [], 0
    if tensors:
        yield tensors, torch.tensor(ranges, dtype=torch.int64).reshape(-1, 4)
        tensors.clear()


def _thresholds(
    batches: Callable[[], Iterable[tuple[Sequence[torch.Tensor], torch.Tensor]]],
    quantiles: torch.Tensor,
    device: torch.device,
    reduce: Callable[[torch.Tensor], object] | None,
) -> torch.Tensor:
    if not bool(((quantiles >= 0) & (quantiles <= 1)).all()):
        raise RuntimeError(f"quantiles must be between 0 and 1, not {quantiles.tolist()}")
    prefixes = torch.zeros(len(quantiles), dtype=torch.int64, device=device)
    rank = None
    for level, (bits, _) in enumerate(reference.LEVELS):
        counts = prefixes.new_zeros(len(quantiles), reference.BINS)
        for tensors, ranges in batches():
            counts += torch.ops.megatron_ext.magnitude_histogram(tensors, ranges, prefixes, level)
        if reduce is not None:
            reduce(counts)
        up_to = counts.cumsum(1)
        if rank is None:
            last = (up_to[:, -1] - 1).clamp(min=0).double()
            rank = (quantiles.to(device) * last).floor().long()
        bin_ = (up_to <= rank[:, None]).sum(1).clamp(max=(1 << bits) - 1)
        below = torch.where(bin_ > 0, up_to.gather(1, (bin_ - 1).clamp(min=0)[:, None])[:, 0], 0)
        rank = rank - below
        prefixes = (prefixes << bits) | bin_
        if level == 0:
            empty = up_to[:, -1] == 0
    return torch.where(empty, 0.0, prefixes.int().view(torch.float32))
