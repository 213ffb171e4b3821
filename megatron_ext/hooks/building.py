"""Wrap the functions that build Megatron's optimizers. Each wrapper gets the original."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..base import ranks
from ..base.log import say
from ..errors import HostError, MegatronExtError
from ..host.arguments import SGD_APART, global_args
from ..host.classes import resolve_class
from ..host.contract import CORE, megatron_version
from ..host.optimizers import state_of
from ..policy.request import Request
from ..report import files
from ..resume.members import members_of
from ..resume.session import Resume, current
from . import preflight
from .session import active_request

#: Megatron's optimizer of whole parameters, each on one rank; since 0.19 in this module.
_LAYER_WISE = "LayerWiseDistributedOptimizer"


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
        if isinstance(optimizer, tuple):
            return optimizer  # a torch optimizer, which the layer-wise one wraps
        _check_built(request, cls, optimizer, call["model_chunks"])
        current.built += 1
        current.member = optimizer
        return optimizer

    return build


def build_emerging(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `_get_megatron_emerging_optimizer`, which chains Muon and others with Adam or Lion."""

    @functools.wraps(original)
    def build(*args: Any, **kwargs: Any) -> Any:
        if (request := active_request()) is None:
            return original(*args, **kwargs)
        call = inspect.signature(original).bind(*args, **kwargs).arguments
        cls = resolve_class(request.optimizer_class)
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
    if config.optimizer == "sgd" and config.use_distributed_optimizer:
        raise HostError(
            f"--optimizer-class {request.optimizer_class} with --optimizer sgd and "
            f"--use-distributed-optimizer: {SGD_APART}"
        )
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
    """Make the members of a chain, such as Muon and Adam, share one resume."""
    members = members_of(optimizer)
    if not members:
        raise HostError(
            f"--optimizer-class {request.optimizer_class}: {type(optimizer).__name__} holds no "
            "optimizer that it can resume. Leave --optimizer-class out"
        )
    resume = resume_of(request)
    for number, member in enumerate(members):
        member.resume_chunks = model_chunks
        member.join(resume)
        inner = type(member.optimizer).__name__
        say(f"megatron_ext: optimizer {number} of the chain is {inner}: {member.described}")
    current.built += 1
    current.member = members[-1]


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
        if hasattr(core, _LAYER_WISE):
            from ..resume import layer_wise

            replacements[_LAYER_WISE] = layer_wise.SelectiveLayerWise
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(core, replacements))
        if _LAYER_WISE in replacements:
            # It wraps its parts itself, in a class that its own module names.
            module = importlib.import_module(f"{CORE}.layer_wise_optimizer")
            part = "Float16OptimizerWithFloat16Params"
            stack.enter_context(_replaced(module, {part: replacements[part]}))
        yield


@contextlib.contextmanager
def _replaced(module: Any, replacements: Mapping[str, Any]) -> Iterator[None]:
    originals = {name: getattr(module, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for name, stock in originals.items():
            setattr(module, name, stock)


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
        state_of(optimizer.optimizer)  # an optimizer that is not known is refused here
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
