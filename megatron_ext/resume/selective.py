"""The base class of `SelectiveAdam` and its non-distributed siblings: plan and finish a load."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..base.ranks import agree, gather
from ..checkpoint.state import MARK_KEY, read_optimizer
from ..errors import CheckpointError, MegatronExtError
from ..host.contract import is_rebound
from ..host.optimizers import OptimizerState, state_of, state_of_member
from ..plan import resized
from ..plan.cautions import lost_step
from ..plan.decisions import Circumstances, ResumePlan
from ..plan.fitting import require_own_state
from ..plan.hyperparameters import plan_resume
from ..plan.mapped import new_warnings
from ..plan.preflight_parameters import unnamed
from ..policy.policy import ResumePolicy
from ..report.loaded import LoadedState
from ..report.model import OptimizerReport
from . import apply_rules, first_step, merge, nonfinite, prepare_rules
from .proof import Proof, refuse_differences
from .resized import resized_of
from .session import Load, Resume
from .steps import decays_decoupled, parameters_of, place_step

_NOT_REBOUND = (
    "the optimizer was built without this package's launcher, enable() and add_arguments(): the "
    "scheduler and the counters load as in stock Megatron, and nothing was checked before. Start "
    "the script with python -m megatron_ext.launch"
)


class Selective:
    """Base class of the three optimizers. It plans a load, finishes it and hands in the report."""

    optimizer: Any
    config: Any
    grad_scaler: Any
    resume: Resume
    _moment_work: prepare_rules.MomentWork | None = None
    #: The resized parameters of the current load, on all ranks.
    _resized: tuple[resized.ResizedParameter, ...] = ()
    #: True while Megatron loads the optimizer's own state dict to allocate memory
    #: (`DistributedOptimizer.sharded_state_dict(is_loading=True)`), which is not a resume.
    _allocating = False

    #: The checkpoint's loss scale, if it is dynamic (fp16).
    _saved_scale: float | None = None
    #: The model chunks the optimizer was built for, which give the names of its parameters.
    resume_chunks: Sequence[Any] = ()
    #: Whether the last sharded state dict was not asked for to load, and has no moments.
    _lacks_moments = False
    #: Whether a step was made since the optimizer was built or loaded.
    stepped = False
    #: Whether the guard has compared the moments after that step.
    moments_checked = False
    #: Euclidean norm of each moment on this rank at the end of the load.
    norms_after_load: tuple[float, ...] | None = None
    #: The arguments' clip_grad, because a preset may change the config's.
    _argument_clip_grad: float | None = None

    def join(self, resume: Resume) -> None:
        """Join a resume that the optimizers of a chain share."""
        self.resume = resume
        resume.join(self)

    @property
    def described(self) -> OptimizerState:
        """The description of the torch optimizer's state."""
        return state_of_member(self)

    def step_with_ready_grads(self) -> bool:
        """Make Megatron's step; the first one since the load is held against the plan.

        Raises:
            HostError, GuardError: As for `megatron_ext.resume.first_step.checked`.
        """
        step: Callable[[], bool] = super().step_with_ready_grads  # type: ignore[misc]
        if self.stepped:
            return step()
        self.stepped = True
        return first_step.checked(self, step)

    def _requests_load(self, is_loading: bool) -> bool:
        """Remember how a sharded state dict was asked for; returns `is_loading`."""
        state = {} if self.optimizer is None else self.optimizer.state
        trained = parameters_of(self.optimizer)
        self._lacks_moments = not is_loading and any(not state.get(p) for p in trained)
        return is_loading

    def _request_error(self) -> CheckpointError | None:
        """Make the error of a state dict that was asked for to save, and has no moments yet."""
        if not self._lacks_moments:
            return None
        return CheckpointError(
            "sharded_state_dict was called without is_loading=True, and the optimizer has no "
            "moments before its first step or load: a checkpoint's moments have no place to go to. "
            "To load, call optimizer.sharded_state_dict(model_sharded_state_dict, is_loading=True, "
            "metadata=...) before dist_checkpointing.load. To save, make a step first"
        )

    @contextlib.contextmanager
    def _self_load(self) -> Iterator[None]:
        groups = self._live_hyperparameters()
        self._allocating = True
        try:
            yield
        finally:
            self._allocating = False
            # The stock loader pairs groups by a tuple that two groups may share, so that it may
            # have overwritten one with the other.
            merge.write_groups(groups, self.optimizer.param_groups)

    def _live_hyperparameters(self) -> list[dict[str, Any]]:
        if self.optimizer is None:
            return []
        return [merge.hyperparameters(g) for g in self.optimizer.param_groups]

    def _agreed_plan(self, state_dict: Mapping[str, Any]) -> ResumePlan:
        """Make the plan; raise on every rank unless all ranks made the same one."""
        load = self.resume.enter("plan", self)
        plan, work, error, lost = None, None, None, False
        digest: str | None
        found: tuple[resized.ResizedParameter, ...] = ()
        try:
            if (unfit := self._request_error()) is not None:
                raise unfit
            saved = read_optimizer(state_dict)
            lost = saved.step is None and load.mapped is not None and self.described.adam
            if lost and load.counters is not None:
                saved = replace(saved, step=load.counters[0].iteration or None)
            require_own_state(saved.groups, self.described)
            phase = self.resume.phase_of(saved)
            plan = plan_resume(
                phase.policy, saved, self.optimizer.param_groups, self._circumstances(load), phase
            )
            work = prepare_rules.prepare(
                self,
                self.resume_chunks,
                plan,
                saved.groups,
                self.resume.members,
                load.unread,
                () if load.mapped is None else load.mapped.new_to_optimizer,
            )
            found = resized_of(self, self.resume_chunks, plan, saved.groups)
            self._require_names(phase.policy, load)
        except MegatronExtError as e:
            error = e
        digest = "" if plan is None else plan.digest()
        if plan is not None and not any(g["params"] for g in self.optimizer.param_groups):
            # A stage that trains nothing never steps, so that its checkpoint has no step.
            digest = None
        facts = None if plan is None else plan.facts
        if agree(f"resume of {kind_of(self)}", digest, error, flag=bool(found), facts=facts):
            found = tuple(sorted({one for of_rank in gather(found) for one in of_rank}))
        assert plan is not None
        self._moment_work = None if work is None else prepare_rules.exchange_with_ranks(work)
        self._resized = found
        warnings = (
            *resized.warnings_of(plan, found),
            *new_warnings(plan, load.mapped),
            *(lost_step(plan, iteration_known=load.counters is not None) if lost else ()),
        )
        return replace(plan, warnings=(*plan.warnings, *warnings))

    def _require_names(self, policy: ResumePolicy, load: Load) -> None:
        """Refuse a parameter map for a checkpoint that does not name what it stores."""
        if policy.parameters and load.mapped is None:
            raise unnamed(policy.parameters)

    def _circumstances(self, load: Load) -> Circumstances:
        if self._argument_clip_grad is None:
            self._argument_clip_grad = self.config.clip_grad
        return Circumstances(
            clip_grad=self._argument_clip_grad,
            decoupled_weight_decay=decays_decoupled(self),
            global_batch_size=load.batch_sizes,
            optimizer=self.described,
        )

    def _finish(self, plan: ResumePlan, loaded: LoadedState, proof: Proof) -> None:
        """Check what was loaded, apply the rules, and hand in the report."""
        work = self._moment_work
        done, bad = apply_rules.apply_in_one_pass(work), None
        if done is None:
            loaded.nonfinite, self.norms_after_load = nonfinite.count_nonfinite(self)
        else:
            bad = done.unusable_before
            loaded.nonfinite = sum(found.total for found in bad.values())
        if plan.policy.master_weights != "model":
            proof.compare_all(self)
        loaded.proven, loaded.differing = proof.proven, proof.differing
        loaded.masters = proof.masters
        loaded.remainders = sum(d.of for d in proof.remainders.values())
        summed = loaded.summed()
        summed.require_moments()
        if contradictory := bool(summed.masters and summed.remainders):
            proof.refuse_remainders()
        if summed.differing or contradictory:
            refuse_differences(proof, self, self.resume_chunks)
        notes: tuple[str, ...] = ()
        if summed.nonfinite:
            choice = plan.policy.nonfinite
            what = nonfinite.handle_nonfinite(self, self.resume_chunks, choice, bad)
            notes = (f"{summed.nonfinite} elements of the moments {what}",)
        moments = None if work is None else apply_rules.apply_rules(work, done)
        if work is not None and moments is not None:
            moments, made = nonfinite.handle_made(work, moments)
            notes += made
            self.norms_after_load = moments.norms_on_this_rank
        elif summed.nonfinite:
            self.norms_after_load = None
        counts = tuple(len(g["params"]) for g in self.optimizer.param_groups)
        scales = None
        if self._saved_scale is not None:
            scales = (self._saved_scale, float(self.grad_scaler.scale))
        elif plan.policy.grad_scaler == "reset":
            notes += ("grad scaler: there is no dynamic loss scale to reset",)
        if not is_rebound():
            notes += (_NOT_REBOUND,)
        report = OptimizerReport(
            kind_of(self), plan, summed, counts, moments, notes, scales, self._resized
        )
        self.stepped = False
        self.resume.done(self, report)

    def _place_grad_scaler(self, plan: ResumePlan, merged: dict[str, Any]) -> None:
        """Put the planned loss scale where the stock loader finds it."""
        scaler = getattr(self, "grad_scaler", None)
        own = {} if scaler is None else scaler.state_dict()
        saved = merged.get("grad_scaler") or {}
        self._saved_scale = float(saved["scale"]) if own and "scale" in saved else None
        if own and plan.policy.grad_scaler == "reset":
            merged["grad_scaler"] = own

    def _write_back(self, plan: ResumePlan) -> None:
        mark = {} if plan.mark is None else {MARK_KEY: plan.mark}
        values = [{**g.values, **mark} for g in plan.groups]
        merge.write_groups(values, self.optimizer.param_groups)
        place_step(self.optimizer, plan.step)
        if plan.clip_grad is not None:
            # The members of a chain may share the config.
            self.config = copy.copy(self.config)
            self.config.clip_grad = plan.clip_grad.value


def kind_of(optimizer: Any) -> str:
    """Name the classes of a Megatron optimizer and of the torch optimizer inside."""
    return f"{type(optimizer).__name__} over {type(optimizer.optimizer).__name__}"


def moments_of(inner: Any, param: torch.Tensor) -> dict[str, Any]:
    """Return the moments of a parameter; empty if it has no state."""
    state = inner.state.get(param, {})
    return {k: state[k] for k in state_of(inner).tensors if k in state}


def allocate_moments(inner: Any, config: Any = None) -> None:
    """Allocate the moments of parameters without state, as their first step would: zeros.

    Args:
        inner: The torch optimizer.
        config: Megatron's OptimizerConfig, which is not used: the signature is Megatron's.
    """
    for group in inner.param_groups:
        for param in group["params"]:
            if not inner.state[param]:
                names = state_of(inner).tensors
                inner.state[param].update({name: torch.zeros_like(param) for name in names})


def allocate_torch_adam_state(inner: torch.optim.Optimizer) -> None:
    """Allocate the state of torch AdamW as its first step would: zero moments and step 0."""
    for group in inner.param_groups:
        for param in group["params"]:
            if not inner.state[param]:
                inner.state[param].update(
                    step=torch.tensor(0.0, dtype=torch.float32),
                    exp_avg=torch.zeros_like(param, requires_grad=False),
                    exp_avg_sq=torch.zeros_like(param, requires_grad=False),
                )
