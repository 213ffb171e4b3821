"""Compare master weights with the weights that they round to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import schema as schema


def weight_differences(
    master: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]
) -> list[tuple[int, float]]:
    """Round master weights to the dtype of the weights and compare the bits.

    Args:
        master: Master weights, each of the length of its weight; fp32, bf16 or fp16, contiguous
            and on one device.
        weights: The weights.

    Returns:
        For each tensor the number of elements that differ, and the largest absolute difference,
        ignoring NaN.

    Raises:
        RuntimeError: An argument is invalid (see `.schema`).
    """
    found = torch.ops.megatron_ext.compare_weights(master, weights).cpu()
    largest = found[:, 1].to(torch.int32).view(torch.float32)
    return list(zip(found[:, 0].tolist(), largest.tolist(), strict=True))
