"""`SelectiveAdam`: the stock `DistributedOptimizer` with a selective load.

The training step is Megatron's own. The class overrides the load entry points, which call the
planning, the merge and the report. It also fixes two cases that the stock class cannot load: torch
AdamW, whose step is in the state, and fp32 parameters, whose shards require grad.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from ..base.ranks import stop_together
from ..checkpoint.state import does_not_fit, misfits, optimizer_section, require_readable
from ..errors import CheckpointError
from ..plan.decisions import ResumePlan
from ..policy.policy import ResumePolicy
from ..report.loaded import LoadedState
from . import merge, offload, precision, saving, selective_read
from .other_optimizer import for_distributed
from .parameter_map import Slot
from .parameters import state_key
from .proof import Proof
from .selective import Selective, allocate_torch_adam_state, moments_of
from .session import Resume
from .steps import is_torch_adam


class SelectiveAdam(Selective, DistributedOptimizer):
    """`DistributedOptimizer` that keeps the moments and takes hyperparameters from the arguments.

    At a load, exp_avg, exp_avg_sq, the fp32 master weights and ``step`` come from the checkpoint.
    Every other key of every param_group comes from the current group unless the policy keeps it.
    With unchanged arguments the load is bit for bit the stock load. The inner optimizer may be
    TransformerEngine's or apex's FusedAdam, torch's AdamW, or another of the table
    `megatron_ext.host.optimizers`.

    Args:
        *args: As for `megatron.core.optimizer.distrib_optimizer.DistributedOptimizer`.
        policy: The source of each value. The default takes no hyperparameter from the checkpoint.
        **kwargs: As for `DistributedOptimizer`.

    Note:
        ``load_state_dict`` and ``load_parameter_state`` are collective over the default process
        group: one all_reduce of 40 bytes per rank before any change (see
        `megatron_ext.base.ranks`), and one of 112 bytes for the report. Before a torch_dist load
        one of 24 bytes compares the parameters. The training step adds no collective.

    Raises (at load):
        PlanError: A key to keep is unknown or ambiguous.
        CheckpointError: There is no optimizer state, or the shards do not fit the model.
        AgreementError: Another rank refused, or the ranks made different plans.
    """

    def __init__(self, *args: Any, policy: ResumePolicy | None = None, **kwargs: Any) -> None:
        """Build the stock optimizer and remember the policy."""
        super().__init__(*args, **kwargs)
        self.join(Resume(policy or ResumePolicy()))
        self.resume_chunks = self.model_chunks
        self._tally, self._proof = LoadedState.of(self.described), Proof()
        self._masters_from_model = self._whole_masters = False
        self._gathered: list[Any] | None = None
        self._awaiting_parameter_state: ResumePlan | None = None

    @property
    def optimizer_state_keys(self) -> tuple[str, ...]:
        """The tensors of the state that the load allocates.

        Stock knows them by the config's name, which is not that of every part of a chain, and has
        Adam's for SGD (distrib_optimizer.py:805, 0.19.2).
        """
        return self.described.tensors

    def state_dict(self) -> dict[str, Any]:
        """Return the stock state dict, also before the first step of a torch AdamW.

        Stock then asserts that an empty state has one common step (distrib_optimizer.py, 0.19.2
        lines 833-836).
        """
        if is_torch_adam(self.optimizer):
            allocate_torch_adam_state(self.optimizer)
            if not self.optimizer.state:
                return self._state_dict_without_shards()
        return super().state_dict()

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the stock sharded state dict. Its self-load for allocation is not a resume.

        Raises:
            CheckpointError: The metadata name a sharding type that Megatron cannot read any more.
        """
        if not self._requests_load(kwargs.get("is_loading", len(args) > 1 and args[1])):
            try:
                return super().sharded_state_dict(*args, **kwargs)
            except KeyError as e:
                raise (self._request_error() or e) from e
        require_readable(kwargs.get("metadata", args[2] if len(args) > 2 else None))
        load = self.resume.enter("allocate", self)
        offload.allocate(self.optimizer)
        new = not self.is_stub_optimizer and not self.optimizer.state
        with contextlib.nullcontext() if self.is_stub_optimizer else self._self_load():
            state_dict = super().sharded_state_dict(*args, **kwargs)
        if new:
            precision.initialise_masters(self)
        load.awaits_tensors = True
        load.slots += (
            Slot(param, key, entries, key)
            for param, entries, _ in selective_read.entries_of(self, state_dict)
            for key in ("param", *self.described.tensors)
            if param is not None and key in entries
        )
        selective_read.mark_unread(self, state_dict, self.resume_chunks)
        return state_dict

    def sharded_param_state_fully_reshardable(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
    ) -> Any:
        """Return the stock state by parameter, with every parameter's own elements."""
        self._gathered = []
        with saving.without_the_warning():
            state = super().sharded_param_state_fully_reshardable(
                model_sharded_state_dict, is_loading, metadata
            )
        gathered, self._gathered = self._gathered, None
        if state is not None and not is_loading:
            saving.put_right(self, state, *gathered)
        return state

    def get_parameter_state_dp_zero(self, *args: Any, **kwargs: Any) -> Any:
        """Return the stock state by buffer, and remember it for a save by parameter.

        TE's remainders are saved as master weights, because stock's buffers are fp32.
        """
        self._whole_masters = True
        try:
            state = super().get_parameter_state_dp_zero(*args, **kwargs)
        finally:
            self._whole_masters = False
        if self._gathered is not None:
            self._gathered.append(state)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Merge selectively, then load with the stock loader.

        Args:
            state_dict: The saved state dict of any Megatron `DistributedOptimizer`. It is not
                modified. With ``param_state`` (torch_dist) this call completes the resume. Without
                it (legacy torch) `load_parameter_state` does.
        """
        if self._allocating:
            super().load_state_dict(state_dict)
            return
        state_dict = for_distributed(state_dict)
        plan = self._agreed_plan(state_dict)
        self._tally, self._proof = LoadedState.of(self.described), Proof()
        self._masters_from_model = plan.policy.master_weights == "model"
        merged = merge.merge_distributed(plan, state_dict, self.optimizer.param_groups)
        self._place_grad_scaler(plan, merged)
        offload.allocate(self.optimizer)
        if is_torch_adam(self.optimizer):
            allocate_torch_adam_state(self.optimizer)
            for group in optimizer_section(merged)[1]["param_groups"]:
                group.setdefault("step", 0)
        super().load_state_dict(merged)
        self._write_back(plan)
        if "param_state" in state_dict:
            self._finish(plan, self._tally, self._proof)
        else:
            self._awaiting_parameter_state = plan

    def load_parameter_state(self, filename: str, *, update_legacy_format: bool = False) -> None:
        """Load a legacy ``distrib_optim.pt``; an unreadable file raises on every rank.

        Args:
            filename: Data-parallel rank 0 reads this file and scatters its tensors.
            update_legacy_format: As for `DistributedOptimizer.load_parameter_state`.
        """
        if self.is_stub_optimizer:
            return
        state_dict, error = None, None
        if self.data_parallel_group.rank() == 0:
            try:
                state_dict = torch.load(filename, map_location="cpu")
            except Exception as e:  # no rank may be left waiting, whatever torch.load raises
                error = _unreadable(filename, e)
        stop_together(f"reading {Path(filename).name}", error)
        self.load_parameter_state_from_dp_zero(
            state_dict, update_legacy_format=update_legacy_format
        )

    def load_parameter_state_from_dp_zero(
        self, state_dict: Any, *, update_legacy_format: bool = False
    ) -> None:
        """Check that the parameter state fits, then scatter it from data-parallel rank 0."""
        error = None
        if state_dict is not None and not update_legacy_format:
            error = self._dp_zero_misfit(state_dict)
        stop_together("loading the distributed optimizer's parameter state", error)
        super().load_parameter_state_from_dp_zero(
            state_dict, update_legacy_format=update_legacy_format
        )
        offload.hand_over(self.optimizer)
        plan, self._awaiting_parameter_state = self._awaiting_parameter_state, None
        if plan is not None:
            if update_legacy_format:
                self._count_state()
            self._finish(plan, self._tally, self._proof)

    def _get_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter) -> Any:
        """Return one parameter's shard without torch AdamW's ``step``, which the groups have."""
        tensors = super()._get_main_param_and_optimizer_states(model_param)
        if self._whole_masters and tensors["param"].dtype == torch.int16:
            shard = self._get_model_param_range_map(model_param)["param"]
            weight = model_param.data.view(-1)[shard.start : shard.end]
            tensors["param"] = precision.joined(weight, tensors["param"])
        if is_torch_adam(self.optimizer):
            tensors.pop("step", None)
        return tensors

    @torch.no_grad()
    def _set_main_param_and_optimizer_states(
        self, model_param: torch.nn.Parameter, tensors: Mapping[str, Any]
    ) -> None:
        """Write one parameter's shard.

        Grad mode is off because shards of fp32 parameters are views of a leaf that requires grad
        (distrib_optimizer.py, 0.19.2 lines 467 and 1225). torch AdamW's live ``step`` is passed on:
        without it stock raises a KeyError or writes a stale one.
        """
        load = self.resume.load
        made = frozenset() if load is None else load.made(model_param)
        self._tally.add(tensors, made)
        shard = self._get_model_param_range_map(model_param)["param"]
        from_model = self._masters_from_model or "param" in made
        if from_model:
            weight = model_param.data.view(-1)[shard.start : shard.end]
            tensors = {**tensors, "param": weight.float()}
        proof = Proof() if from_model else self._proof
        masters = precision.fit_masters(self, model_param, tensors["param"], proof)
        tensors = {**precision.store_scaled(self, model_param, tensors), "param": masters}
        if from_model:
            self._proof.done.add(id(model_param))
        elif model_param.dtype == self.config.main_params_dtype == torch.float32:
            # It is its own master weight, and is overwritten.
            self._proof.compare(model_param, tensors["param"], shard.start, shard.end)
        if is_torch_adam(self.optimizer):
            key = state_key(self, model_param)
            tensors = {**tensors, "step": self.optimizer.state[key]["step"]}
        super()._set_main_param_and_optimizer_states(model_param, tensors)

    def _state_dict_without_shards(self) -> dict[str, Any]:
        # A rank that trains nothing may have the others' step (`saving.set_step`).
        live = self.optimizer.param_groups
        groups = [{**merge.hyperparameters(g), "step": g.get("step", 0)} for g in live]
        state_dict: dict[str, Any] = {"optimizer": {"param_groups": groups}}
        if self.grad_scaler:
            state_dict["grad_scaler"] = self.grad_scaler.state_dict()
        return state_dict

    def _dp_zero_misfit(self, state_dict: Mapping[Any, Any]) -> CheckpointError | None:
        wanted = {
            f"buffer {index}, {dtype[0]}": [self.buffers[index].numel_unpadded]
            for index, ranges in enumerate(self.gbuf_ranges)
            for dtype in ranges
        }
        if any("uint8" in key for key in wanted):
            return None  # the stock loader splits fp8 buffers from bf16 ones
        saved = {
            f"buffer {index}, {dtype[0]}": [world["numel_unpadded"]]
            for index, dtypes in state_dict.items()
            if isinstance(index, int)
            for dtype, world in dtypes.items()
            if "numel_unpadded" in world
        }
        lines = misfits(wanted, saved)
        return does_not_fit(lines) if lines else None

    def _count_state(self) -> None:
        """Count the state that the pre-2024 legacy loader has written itself."""
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                self._tally.add({"param": param, **moments_of(self.optimizer, param)})


def _unreadable(filename: str, cause: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot read the distributed optimizer's parameter state {filename}: "
        f"{type(cause).__name__}: {cause}. Restore the file or pass --no-load-optim to start with "
        "a new optimizer (the Adam moments are then lost)"
    )
