"""A mixture of gated experts that is too large to be made: what is computed about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class Experts:
    """The experts, and how they are spread.

    Args:
        layers: Transformer layers.
        experts: Of a layer.
        hidden: Hidden size.
        expert_ffn: Hidden size of an expert.
        pipeline: Pipeline-parallel size.
        expert: Expert-parallel size.
        ranks: All ranks.
    """

    layers: int = 64
    experts: int = 304
    hidden: int = 8192
    expert_ffn: int = 2048
    pipeline: int = 16
    expert: int = 16
    ranks: int = 16384

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Of an expert's matrices."""
        return {
            "linear_fc1": (2 * self.expert_ffn, self.hidden),
            "linear_fc2": (self.hidden, self.expert_ffn),
        }

    @property
    def expert_elements(self) -> int:
        """Of all experts, by the closed form."""
        return self.layers * self.experts * 3 * self.hidden * self.expert_ffn

    def twice(self) -> Self:
        """Twice the layers on twice the ranks."""
        return replace(self, layers=2 * self.layers, ranks=2 * self.ranks)
