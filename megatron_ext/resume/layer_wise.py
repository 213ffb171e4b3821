"""`LayerWiseDistributedOptimizer` with the load of `SelectiveAdam`.

It holds whole parameters, each on one rank, in optimizers that are not distributed otherwise. Those
of vectors and embeddings may be in a DistributedOptimizer beside it
(core/optimizer/__init__.py:891, 0.19.2).
"""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

from ..checkpoint.state import optimizer_section
from .replicated import SelectiveFloat16Optimizer


class SelectiveLayerWise(LayerWiseDistributedOptimizer):
    """`LayerWiseDistributedOptimizer` over this package's optimizers."""

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        """Return the stock sharded state dict. Its number of groups may differ from the saved.

        Stock reads the param_groups of its parts, so that those leave them in.
        """
        members = [m for m in self.chained_optimizers if isinstance(m, SelectiveFloat16Optimizer)]
        for member in members:
            member.keeps_groups = True
        state_dict = super().sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
        if is_loading:
            parts = [state_dict] if len(self.chained_optimizers) == 1 else state_dict.values()
            for part in parts:
                _, section = optimizer_section(part)
                section.pop("param_groups")  # type: ignore[attr-defined]
        return state_dict
