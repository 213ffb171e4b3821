"""Wrap the functions that build Megatron's optimizers. Each wrapper gets the original."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from ..base import ranks
from ..base.log import say
from ..errors import HostError, MegatronExtError
from ..host.arguments import LAYER_WISE, global_args, is_layer_wise
from ..host.classes import resolve_class
from ..host.contract import CORE, megatron_version
from ..policy.request import Request
from ..report import files
from ..resume.members import members_of
from ..resume.session import Resume, current
from ..resume.steps import is_adam
from . import preflight
from .session import active_request


def build_optimizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_get_megatron_optimizer_based_on_param_groups`."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        request = _agreed_request()
        if request is None:
            return original(*args, **kwargs)
        cls = resolve_class(request.optimizer_class)
        call = signature.bind(*args, **kwargs).arguments
        _refuse_unsupported(request, call["config"], call["model_chunks"])
        with _substituted(cls):
            optimizer = original(*args, **kwargs)
        _check_built(request, cls, optimizer, call["model_chunks"])
        current.built += 1
        current.member = optimizer
        return optimizer

    return build


def build_emerging(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_get_megatron_emerging_optimizer`, which chains an Adam with Muon and others."""

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        if (request := active_request()) is None:
            return original(*args, **kwargs)
        call = inspect.signature(original).bind(*args, **kwargs).arguments
        config, chosen = call["config"], request.optimizer_class
        if is_layer_wise(config):
            raise HostError(
                f"--optimizer-class {chosen} with --optimizer {config.optimizer} and "
                f"--use-distributed-optimizer: {LAYER_WISE}"
            )
        cls = resolve_class(chosen)
        with _substituted(cls):
            optimizer = original(*args, **kwargs)
        _join_emerging(request, optimizer, call["model_chunks"])
        return optimizer

    return build


def chain(original: Callable[..., None]) -> Callable[..., None]:
    """Wrap `ChainedOptimizer.__init__`, so that a chain has one resume and one report."""

    @functools.wraps(original)
    def init(self: Any, chained_optimizers: list[Any]) -> None:
        original(self, chained_optimizers)
        members = members_of(self)
        if len(members) > 1:
            shared = members[0].resume
            for member in members[1:]:
                member.join(shared)

    return init


def resume_of(request: Request) -> Resume:
    """Make a resume that the optimizers of a chain share."""
    write = None if request.report_dir is None else files.writer(request.report_dir)
    return Resume(
        request.policy,
        write,
        megatron_version(),
        where=request.where,
        verify=request.verify,
        guard=request.guard,
    )


def _refuse_unsupported(request: Request, config: Any, model_chunks: Any) -> None:
    if config.optimizer != "adam":
        raise _not_adam(request, config.optimizer)
    if config.overlap_param_gather_with_optimizer_step:
        raise HostError(
            f"--optimizer-class {request.optimizer_class} with "
            "--overlap-param-gather-with-optimizer-step: Megatron then splits the dense parameters "
            "into two chained optimizers by model chunk, which is not tested with a selective "
            "resume. Leave the flag out for this run"
        )
    ddp_config = getattr(model_chunks[0], "ddp_config", None)
    if getattr(ddp_config, "use_megatron_fsdp", False):
        raise HostError(
            f"--optimizer-class {request.optimizer_class} with --use-megatron-fsdp: Megatron-FSDP "
            "keeps its optimizer state in its own layout and does not load through "
            "DistributedOptimizer. Use --use-distributed-optimizer without it"
        )
    args = global_args()
    if getattr(args, "use_torch_fsdp2", False):
        raise HostError(
            f"--optimizer-class {request.optimizer_class} with --use-torch-fsdp2: torch FSDP2 "
            "loads in place and bypasses the optimizer's load_state_dict"
        )
    if getattr(args, "non_persistent_ckpt_type", None) == "local":
        raise HostError(
            f"--optimizer-class {request.optimizer_class} with --non-persistent-ckpt-type local: "
            "a local checkpoint takes precedence over --load and is not tested with a selective "
            "resume. Use --non-persistent-ckpt-type global, or none for the first resume"
        )


def _join_emerging(request: Request, optimizer: Any, model_chunks: Any) -> None:
    """Make the members of a chain that Muon and Adam share one resume."""
    members = members_of(optimizer)
    if not any(is_adam(m.optimizer) for m in members):
        raise HostError(
            f"--optimizer-class {request.optimizer_class}: no Adam in {type(optimizer).__name__}, "
            "so there are no moments to keep. Leave --optimizer-class out"
        )
    resume = resume_of(request)
    for member in members:
        member.resume_chunks = model_chunks
        member.join(resume)
        if not is_adam(member.optimizer):
            inner = type(member.optimizer).__name__
            say(f"megatron_ext: {inner} is not Adam: its state is kept, moment rules do not apply")
    current.built += 1
    current.member = members[-1]


def _not_adam(request: Request, optimizer: str) -> HostError:
    return HostError(
        f"--optimizer-class {request.optimizer_class} with --optimizer {optimizer}: only Adam is "
        f"supported (its state is exp_avg and exp_avg_sq); '{optimizer}' and chains that contain "
        "it are not. Use --optimizer adam, or leave --optimizer-class out"
    )


@contextlib.contextmanager
def _substituted(cls: type) -> Iterator[None]:
    """Replace the optimizer classes where Megatron builds optimizers, and only there."""
    # These modules import Megatron, so that they are imported after the contract has been checked.
    from ..resume import replicated
    from ..resume.optimizer import SelectiveAdam

    core = importlib.import_module(CORE)
    replacements = {"DistributedOptimizer": cls}
    if issubclass(cls, SelectiveAdam):
        replacements["Float16OptimizerWithFloat16Params"] = replicated.SelectiveFloat16Optimizer
        replacements["FP32Optimizer"] = replicated.SelectiveFP32Optimizer
    originals = {name: getattr(core, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(core, name, replacement)
    try:
        yield
    finally:
        for name, stock in originals.items():
            setattr(core, name, stock)


def _agreed_request() -> Request | None:
    """Return the request, or None without one; collective if there is a request or an error.

    Raises:
        MegatronExtError: The request cannot be fulfilled, or the ranks differ.
    """
    args, request, error = global_args(), None, None
    try:
        if getattr(args, "optimizer_class", None) is not None:
            error = preflight.error_of(args)
        request = active_request()
    except MegatronExtError as e:
        error = e
    if request is not None or error is not None:
        ranks.agree_on("the policy", _facts(request), error)
        current.agreed = True
    return request


def _facts(request: Request | None) -> dict[str, str]:
    """Return what must be the same on every rank, as text."""
    if request is None:
        return {"--optimizer-class": "not given"}
    asked = {"--optimizer-class": request.optimizer_class, "--selective-from": request.where}
    return {name: str(value) for name, value in {**asked, **request.policy.facts()}.items()}


def _check_built(request: Request, cls: type, optimizer: Any, model_chunks: Any) -> None:
    inner = type(getattr(optimizer, "optimizer", None)).__name__
    if members_of(optimizer):
        optimizer.resume_chunks = model_chunks
        optimizer.join(resume_of(request))
    if isinstance(optimizer, cls):
        say(f"megatron_ext: {cls.__name__} in place of DistributedOptimizer, over {inner}")
        return
    if not members_of(optimizer):
        raise HostError(
            f"--optimizer-class {request.optimizer_class}: it replaces "
            f"DistributedOptimizer, but {type(optimizer).__name__} was built. Add "
            "--use-distributed-optimizer"
        )
    say(
        f"megatron_ext: without --use-distributed-optimizer there is no DistributedOptimizer for "
        f"{cls.__name__} to replace; {type(optimizer).__name__} over {inner} resumes by the same "
        "rules"
    )
