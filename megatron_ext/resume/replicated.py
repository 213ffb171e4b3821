"""The selective load of `SelectiveAdam` for optimizers that are not distributed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from ..base.ranks import stop_together
from ..checkpoint.state import optimizer_section
from ..errors import MegatronExtError
from ..policy.policy import ResumePolicy
from ..report.loaded import LoadedState
from . import merge, selective_read
from .other_optimizer import for_replicated
from .parameter_map import Slot
from .parameters import held_parameters
from .proof import Proof, masters_from_model
from .selective import Selective, allocate_moments, kind_of
from .session import Resume


class _SelectiveReplicated(Selective):
    """Base class for optimizers that are not distributed over the data-parallel ranks."""

    _ids_are_live = False
    #: Whether the param_groups stay in the sharded state dict (`SelectiveLayerWise` drops them).
    keeps_groups = False
    init_state_fn: Any

    def __init__(self, *args: Any, policy: ResumePolicy | None = None, **kwargs: Any) -> None:
        """Build the stock optimizer and remember the policy."""
        super().__init__(*args, **kwargs)
        self.join(Resume(policy or ResumePolicy()))

    @staticmethod
    def _filter_and_reorder_param_groups(
        current_groups: list[dict[str, Any]], state_dict_groups: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        # The merged groups are already in the order of the live ones.
        return state_dict_groups

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, **kwargs: Any
    ) -> Any:
        """Return the stock sharded state dict. Its number of groups may differ from the saved."""
        self._requests_load(is_loading)
        if is_loading and self.init_state_fn is None:
            # SGD's (core/optimizer/__init__.py:624, 0.19.2), with which stock cannot load.
            self.init_state_fn = allocate_moments
        state_dict = super().sharded_state_dict(  # type: ignore[misc]
            model_sharded_state_dict, is_loading, **kwargs
        )
        if is_loading:
            # dist_checkpointing merges only lists of equal length, and the live optimizer has the
            # ids of its parameters anyway.
            self._ids_are_live = True
            if not self.keeps_groups:
                _, section = optimizer_section(state_dict)
                section.pop("param_groups")  # type: ignore[attr-defined]
            load = self.resume.enter("allocate", self)
            load.awaits_tensors = True
            load.slots += _slots(self, state_dict)
            selective_read.mark_unread(self, state_dict, self.resume_chunks)
        return state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Merge selectively, then load with the stock loader.

        Args:
            state_dict: The saved state dict of the stock class, from torch_dist or legacy torch.
                It is not modified.
        """
        if self._ids_are_live:
            state_dict = for_replicated(
                state_dict,
                masters=hasattr(self, "fp32_from_float16_groups"),
                step_in_state=self.described.step == "state",
            )
        plan = self._agreed_plan(state_dict)
        live_ids = [g["params"] for g in self.optimizer.state_dict()["param_groups"]]
        merged, error = None, None
        try:
            merged = merge.merge_replicated(
                plan,
                state_dict,
                self.optimizer.param_groups,
                live_ids,
                ids_are_live=self._ids_are_live,
            )
        except MegatronExtError as e:
            error = e
        stop_together(f"resume of {kind_of(self)}", error)
        assert merged is not None
        self._place_grad_scaler(plan, merged)
        super().load_state_dict(merged)  # type: ignore[misc]
        self._ids_are_live = False
        self._write_back(plan)
        loaded = LoadedState.of(self.described)
        load = self.resume.load
        for held in held_parameters(self):
            state = self.optimizer.state.get(held.key, {})
            made = () if load is None else load.made(held.model_param)
            loaded.add({"param": held.key, **state}, made)
        proof = Proof()
        if plan.policy.master_weights == "model":
            masters_from_model(self)
        else:
            new = frozenset() if load is None else load.new.get("param", frozenset())
            masters_from_model(self, new)
            proof.done.update(new)
        self._finish(plan, loaded, proof)


def _slots(optimizer: Any, state_dict: Mapping[str, Any]) -> Iterator[Slot]:
    """Yield the places of each parameter's master weights and moments.

    The master weights are in a list for each group (core/optimizer/optimizer.py:1162, 0.19.2).
    """
    for param, entries, _ in selective_read.entries_of(optimizer, state_dict):
        tensors = optimizer.described.tensors
        yield from (Slot(param, key, entries, key) for key in tensors if key in entries)
    groups = zip(
        getattr(optimizer, "float16_groups", ()),
        state_dict.get("fp32_from_fp16_params", ()),
        strict=True,
    )
    for of_model, entries in groups:
        yield from (Slot(param, "param", entries, i) for i, param in enumerate(of_model))


class SelectiveFloat16Optimizer(_SelectiveReplicated, Float16OptimizerWithFloat16Params):
    """`Float16OptimizerWithFloat16Params` (bf16, fp16) with the load of `SelectiveAdam`."""


class SelectiveFP32Optimizer(_SelectiveReplicated, FP32Optimizer):
    """`FP32Optimizer` with the load of `SelectiveAdam`."""
