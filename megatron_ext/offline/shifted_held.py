"""What a rank of the run that saved a checkpoint held of a parameter. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

_SHARED = re.compile(r"embedding\.word_embeddings\.weight|output_layer\.weight")
_EXPERT = re.compile(r"\.mlp\.experts\.")
#: A parameter of a layer, whose number is in the key or is an axis of the tensor.
LAYER = re.compile(r"(?:.*\.)?layers\.(?:(?P<number>\d+)\.)?(?P<rest>.+)", re.DOTALL)


@dataclass(frozen=True)
class Held:
    """What one rank held of a parameter.

    Args:
        key: The model's key of the tensor.
        lead: The layer and the expert in the tensor.
        name: Global name of the parameter.
        pieces: Offset and shape of the stored pieces, in the rank's order: one, or the halves of a
            gated layer.
        dtype: Dtype of the model's weights.
        buffer: What tells a rank's buffers apart: the virtual stage, and whether it is an expert's.
        stored: Whether this rank stored it. It did not if another one held the same.
    """

    key: str
    lead: tuple[int, ...]
    name: str
    pieces: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    dtype: torch.dtype
    buffer: tuple[int, bool] = (0, False)
    stored: bool = True

    @property
    def elements(self) -> int:
        """The number of elements."""
        return sum(torch.Size(shape).numel() for _, shape in self.pieces)

    @property
    def shared(self) -> bool:
        """Whether pipeline stages may share it."""
        return _SHARED.fullmatch(self.key) is not None

    @property
    def layer(self) -> int | None:
        """The number of its layer."""
        found = LAYER.fullmatch(self.key)
        if found is None:
            return None
        return self.lead[0] if found["number"] is None else int(found["number"])

    @property
    def expert(self) -> int:
        """The number of its expert, if that is an axis of the tensor."""
        found = LAYER.fullmatch(self.key)
        by_layer = found is not None and found["number"] is None
        return (*self.lead[by_layer:], 0)[0]


def is_expert(key: str) -> bool:
    """Whether a tensor of the model is of experts."""
    return _EXPERT.search(key) is not None
