"""Which ranks of the run that saved a checkpoint had one buffer. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any


class Ranks:
    """The ranks of a run.

    Args:
        args: The saved arguments of the run. Without the parallel sizes, every rank that has
            written state is taken for one that has written all of its buffers.
    """

    def __init__(self, args: Mapping[str, Any]) -> None:
        self._tensor = _size(args, "tensor_model_parallel_size")
        self._pipeline = _size(args, "pipeline_model_parallel_size")
        self._context = _size(args, "context_parallel_size") or 1
        self._expert = _size(args, "expert_model_parallel_size")
        self._expert_tensor = _size(args, "expert_tensor_parallel_size") or self._tensor
        self._instances = _size(args, "num_distributed_optimizer_instances") or 1
        self._world = _size(args, "world_size")
        self._pipeline_before_data = bool(args.get("use_tp_pp_dp_mapping"))
        #: Whether a pipeline stage has several parts of the model.
        self.virtual = (_size(args, "virtual_pipeline_model_parallel_size") or 1) > 1

    def group_of(self, rank: str, expert: bool) -> Hashable:
        """Return what all ranks with the same parameters have in common.

        Args:
            rank: The rank that has written something.
            expert: Whether it is of an expert.
        """
        if not (self._tensor and self._pipeline and self._world) or not rank.isdigit():
            return rank
        number, model = int(rank), (self._tensor, 1)
        if expert and self.experts_apart:
            model = (self._expert_tensor or 1, self._expert or 1)
        tensor, expert_rank = number % model[0], number // model[0] % model[1]
        if not self._pipeline_before_data:
            stage = number // (self._world // self._pipeline)
        elif model[1] > 1:
            stage = number // (model[0] * model[1]) % self._pipeline
        else:
            stage = number // (model[0] * self._context) % self._pipeline
        return expert and self.experts_apart, tensor, expert_rank, stage

    @property
    def experts_apart(self) -> bool | None:
        """Whether experts have buffers of their own; None if it is not known."""
        return None if self._expert is None else self._expert > 1

    @property
    def data_parallel(self) -> list[int]:
        """Over how many ranks a buffer may have been spread; empty if it is not known."""
        if not (self._tensor and self._pipeline and self._world):
            return []
        of_stage = self._world // self._pipeline
        dense = of_stage // self._tensor
        experts = of_stage // ((self._expert_tensor or 1) * (self._expert or 1))
        sizes = (dense, experts, dense // self._instances, experts // self._instances)
        return list(dict.fromkeys(size for size in sizes if size > 0))


def _size(args: Mapping[str, Any], name: str) -> int | None:
    value = args.get(name)
    return value if isinstance(value, int) and value > 0 else None
