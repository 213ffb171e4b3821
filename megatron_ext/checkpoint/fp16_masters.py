"""How far fp16 master weights are from the weights of the model.

Transformer Engine rounds the fp32 result of a step into both (``--main-params-dtype fp16``,
transformer_engine/pytorch/optimizers/fused_adam.py), so that neither is the other one, rounded.
fp16 master weights have one scale for a shard, whose largest element becomes 32752.
"""

from __future__ import annotations

import torch

#: The smallest fp16 number by the largest that TE stores, half of fp16's range.
_SMALLEST = 2.0**-24 / (65504.0 / 2.0)
#: Three roundings to fp16: of the weight, at the save, and at a load with another scale.
_OF_FP16 = 2.0**-9


def distance(master: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the largest distance of two values that were rounded from the same one.

    Args:
        master: fp16 master weights, unscaled.
        weight: The same elements of the model's weights, in the model's dtype.
    """
    relative = max(torch.finfo(weight.dtype).eps, _OF_FP16)
    largest = master.abs().nan_to_num(0.0).max()
    return weight.to(master.dtype).abs() * relative + largest * _SMALLEST
