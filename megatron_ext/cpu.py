"""Run unmodified Megatron on a machine without a GPU, over gloo.

Megatron asks for CUDA in many places: tensors are created on ``"cuda"``, streams order the
communication, random states live in CUDA generators, parameter types are compared by their CUDA
names. :func:`install` rebinds those names in ``torch`` (and a few in ``megatron.core``) so that
they mean the CPU. Nothing of Megatron is changed on disk, and importing this module changes nothing
at all. It is meant for tests, demonstrations and dry runs: the numbers come from the real training
code, the speed does not.

Call it in every rank before the training script runs::

    from megatron_ext import cpu
    cpu.install()

Written for megatron-core 0.16.1, 0.17.1, 0.18.2 and 0.19.2; paths below are relative to
``megatron/``, lines are those of 0.19.2. Nothing of this package is imported, so that the file can
be loaded by its path where the package is not installed.

Environment:
    TORCHDYNAMO_DISABLE, CUDA_DEVICE_MAX_CONNECTIONS: set to 1 by `install` where they are not set.
    RANK: set by torchrun; rank 0 says what it runs on.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.distributed.distributed_c10d as c10d
from torch.utils import _device as torch_device_mode
from torch.utils.data import dataloader as data_loader

# The mark lives in torch, not here: the file may be loaded twice in one process, by two names.
_MARK = "_megatron_ext_cpu"

# An Ampere: no path made for Hopper or Blackwell alone is chosen.
_CAPABILITY = (8, 0)


def active() -> bool:
    """Whether :func:`install` has made this process run Megatron on the CPU."""
    return hasattr(torch.cuda, _MARK)


def install(*, adam: Literal["fused", "torch"] = "fused") -> bool:
    """Make Megatron run on the CPU in this process, unless a GPU is usable.

    A second call changes nothing.

    Args:
        adam: ``"fused"`` puts :class:`FusedAdamStandIn` where Megatron expects the FusedAdam of
            Transformer Engine or apex, if neither can be imported, so that ``step`` is kept as in a
            run on GPUs. ``"torch"`` leaves Megatron's fallback, ``torch.optim.AdamW``.

    Returns:
        True when Megatron runs on the CPU, False when a GPU is usable and nothing was changed.

    Raises:
        ValueError: ``adam`` is neither of the two, or differs from an earlier call's.
    """
    if adam not in ("fused", "torch"):
        raise ValueError(f"adam must be 'fused' or 'torch', got {adam!r}")
    if active():
        installed = getattr(torch.cuda, _MARK)
        if installed != adam:
            raise ValueError(f"already installed with adam={installed!r}, not {adam!r}")
        return True
    if torch.cuda.is_available():
        return False
    # Compiling the fusions takes longer than any small run. The second is asserted with tensor
    # parallelism (training/arguments.py, validate_args).
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Megatron imports it too; its tables of torch's functions must be made from the originals.
    importlib.import_module("torch._dynamo")
    _send_cuda_tensors_to_cpu()
    _name_tensor_types_as_cuda()
    _answer_cuda_runtime_calls()
    _keep_data_loaders_off_the_device_generator()
    _use_gloo()
    _keep_compiled_dataset_helpers()
    _name_what_transformer_engine_would()
    adam_in_use = _stand_in_for_fused_adam() if adam == "fused" else "as Megatron finds it"
    setattr(torch.cuda, _MARK, adam)
    if os.environ.get("RANK", "0") == "0":
        note = f"no GPU; running Megatron on the CPU over gloo (Adam: {adam_in_use})"
        print(f"megatron_ext.cpu: {note}", flush=True)
    return True


def _called_from_megatron() -> bool:
    """Whether the function that asks was called by Megatron's own code."""
    # The whole first component is compared: megatron_ext is not Megatron.
    return str(sys._getframe(2).f_globals.get("__name__")).split(".")[0] == "megatron"


def _cpu_for_cuda(device: Any) -> Any:
    """Return ``device``, or the CPU for a CUDA device; a bare index means CUDA to torch."""
    if isinstance(device, int) or str(device).split(":")[0] == "cuda":
        return torch.device("cpu")
    return device


def _without_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` with its keywords ``device`` and ``pin_memory`` made to fit the CPU."""

    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return on_cpu


def _send_cuda_tensors_to_cpu() -> None:
    """Let ``device="cuda"`` or an index, ``.cuda()`` and ``.to("cuda")`` give CPU tensors.

    Megatron passes ``'cuda'`` or ``torch.cuda.current_device()``, e.g. for the gradient buffers
    (core/distributed/param_and_grad_buffer.py) and the empty optimizer state of a load
    (core/optimizer/distrib_optimizer.py:998).
    """
    # This also fills torch's cache with the originals, which `with torch.device(...)` compares to.
    constructors = {function.__name__ for function in torch_device_mode._device_constructors()}
    likes = {f"{name}_like" for name in ("empty", "full", "ones", "rand", "randint", "randn")}
    for name in constructors | likes | {"zeros_like"}:
        if hasattr(torch, name):
            setattr(torch, name, _without_cuda(getattr(torch, name)))
    for name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"):
        setattr(torch.Tensor, name, _without_cuda(getattr(torch.Tensor, name)))
    to_with_keywords = _without_cuda(torch.Tensor.to)

    @functools.wraps(torch.Tensor.to)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], (int, str, torch.device)):
            args = (_cpu_for_cuda(args[0]), *args[1:])
        return to_with_keywords(self, *args, **kwargs)

    tensor: Any = torch.Tensor
    tensor.to = to
    tensor.cuda = lambda self, *args, **kwargs: self
    tensor.pin_memory = lambda self, *args, **kwargs: self
    tensor.record_stream = _do_nothing


def _name_tensor_types_as_cuda() -> None:
    """Let ``tensor.type()`` say ``torch.cuda.FloatTensor`` to Megatron, and only to Megatron.

    It sorts parameters by that string and refuses all others (core/optimizer/optimizer.py:1009,
    distrib_optimizer.py:401, clip_grads.py:174).
    """
    stock_type: Callable[..., Any] = torch.Tensor.type

    @functools.wraps(stock_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = stock_type(self, *args, **kwargs)
        if isinstance(result, str) and _called_from_megatron():
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    tensor: Any = torch.Tensor
    tensor.type = type_


class _Stream(torch.cpu.Stream):
    """A stream whose work is done when the call that ordered it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    synchronize = query = lambda self: True


class _Event(torch.cpu.Event):
    """An event that has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def elapsed_time(self, end_event: Any) -> float:
        return 0.0


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _answer_cuda_runtime_calls() -> None:
    """Give ``torch.cuda`` one device whose work is always finished and whose memory is empty.

    Its generator is torch's default one: Megatron's tracker of random states
    (core/tensor_parallel/random.py) then forks the generator that CPU tensors really use. Its
    warning that the CPU's state moved in such a fork, true by construction here, is not logged.
    ``is_available`` is true for Megatron, which refuses to start without
    (training/initialize.py:66), and stays false for torch, whose Adam would look for a CUDA graph.
    """
    stream = _Stream()
    major, minor = _CAPABILITY
    properties = SimpleNamespace(
        name="cpu", major=major, minor=minor, total_memory=0, multi_processor_count=1
    )
    answers: dict[str, Any] = {
        "Event": _Event,
        "Stream": _Stream,
        "_lazy_call": lambda callback, **kwargs: callback(),
        "_lazy_init": _do_nothing,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: stream,
        "default_generators": (torch.default_generator,),
        "default_stream": lambda device=None: stream,
        "device_count": lambda: 1,
        "device_memory_used": lambda device=None: 0,
        "get_device_capability": lambda device=None: _CAPABILITY,
        "get_device_properties": lambda device=None: properties,
        "is_available": lambda: _called_from_megatron(),
        "is_current_stream_capturing": lambda: False,
        "memory_stats": lambda device=None: defaultdict(int),
        "reset_peak_memory_stats": _do_nothing,
        "set_device": _do_nothing,
        "set_stream": _do_nothing,
        "stream": contextlib.nullcontext,
        "synchronize": _do_nothing,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    # Imported by name and so copied: by torch.cuda.random, and by Megatron if it came first.
    copied = ("_lazy_call", "_lazy_init", "current_device", "device_count")
    early = [module for name, module in sys.modules.items() if name.startswith("megatron.core.")]
    for module in (torch.cuda.random, *early):
        for name in copied:
            if name in vars(module):
                setattr(module, name, answers[name])
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: not record.getMessage().startswith("CPU RNG state changed")
    )


def _keep_data_loaders_off_the_device_generator() -> None:
    """Let a new data iterator leave the random state as it found it.

    It draws a seed from the CPU generator, which is not the one dropout draws from on a GPU. Here
    they are one, and a resumed run, which makes its iterators after the checkpoint's random state
    is loaded (training/training.py:1362), would go on with other dropout masks.
    """
    stock_init = data_loader._BaseDataLoaderIter.__init__

    @functools.wraps(stock_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        state = torch.get_rng_state()
        stock_init(self, *args, **kwargs)
        torch.set_rng_state(state)

    iterator: Any = data_loader._BaseDataLoaderIter
    iterator.__init__ = init


def _use_gloo() -> None:
    """Let a default process group asked for with NCCL be a gloo one, bound to no device.

    ``--distributed-backend`` is nccl unless given; all other groups follow the default one or ask
    for gloo themselves (core/parallel_state.py, create_group).
    """
    stock_init = c10d.init_process_group

    @functools.wraps(stock_init)
    def init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("device_id", None)
        stock_init("gloo" if "nccl" in str(backend) else backend, *args, **kwargs)

    for module in (c10d, torch.distributed):
        module.init_process_group = init_process_group  # type: ignore[attr-defined]


def _keep_compiled_dataset_helpers() -> None:
    """Do not run ``make`` for the dataset helpers where they are already compiled.

    The wheel holds the library without the Makefile, and Megatron exits when ``make`` fails
    (core/datasets/utils.py, compile_helpers; called by training/initialize.py:178).
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return
    from megatron.core.datasets import utils

    utils.compile_helpers = _do_nothing


def _name_what_transformer_engine_would() -> None:
    """Let a MoE router find that there is no Transformer Engine.

    0.16.1 asks ``te_general_gemm is not None`` of a name it only has with Transformer Engine
    (core/transformer/moe/moe_utils.py:1192 there); later versions set it to None.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


class FusedAdamStandIn(torch.optim.Optimizer):
    r"""The FusedAdam of Transformer Engine or apex, as far as Megatron can tell, in plain torch.

    Two things differ from ``torch.optim.AdamW`` and show in a checkpoint: ``step`` is one integer
    in each parameter group, absent before the first step and never counted in a group without
    parameters, and the state of a parameter is ``exp_avg`` and ``exp_avg_sq`` alone. In fp32:

    .. math::
        m \leftarrow \beta_1 m + (1-\beta_1) g, \qquad v \leftarrow \beta_2 v + (1-\beta_2) g^2,
        \qquad p \leftarrow p - \eta \left( \frac{m / (1-\beta_1^t)}
        {\sqrt{v / (1-\beta_2^t)} + \epsilon} + \lambda p \right)

    Args:
        params: Parameters, or groups of them.
        lr: :math:`\eta`.
        bias_correction: Whether the moments are divided by :math:`1-\beta^t`.
        betas: :math:`\beta_1` and :math:`\beta_2`.
        eps: :math:`\epsilon`.
        weight_decay: :math:`\lambda`.
        adam_w_mode: Whether the decay is decoupled, as above, or added to the gradient.
        **fused_only: What Megatron passes on to the kernels (core/optimizer/__init__.py:543), such
            as ``capturable``; taken while it asks for nothing.

    Raises:
        ValueError: Something was asked for that only the kernels have.

    References:
        - transformer_engine/pytorch/optimizers/fused_adam.py
        - apex/optimizers/fused_adam.py
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        **fused_only: Any,
    ) -> None:
        asked = {k: v for k, v in fused_only.items() if v not in (False, None, torch.float32)}
        if asked:
            raise ValueError(f"the CPU stand-in for FusedAdam does not have {asked}")
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update parameters and moments in place and count one step in each group."""
        for group in self.param_groups:
            if group["params"]:
                group["step"] = int(group.get("step", 0)) + 1
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, param.grad.float(), group)

    def _update(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        """Update one parameter and its moments in place."""
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        (beta1, beta2), decay, weight = group["betas"], group["weight_decay"], param.float()
        bias1 = 1 - beta1 ** group["step"] if group["bias_correction"] else 1.0
        bias2 = 1 - beta2 ** group["step"] if group["bias_correction"] else 1.0
        if decay and not self.adam_w_mode:
            grad = grad.add(weight, alpha=decay)
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        update = state["exp_avg"] / bias1 / ((state["exp_avg_sq"] / bias2).sqrt() + group["eps"])
        if decay and self.adam_w_mode:
            update.add_(weight, alpha=decay)
        param.copy_(weight - group["lr"] * update)


def _stand_in_for_fused_adam() -> str:
    """Bind :class:`FusedAdamStandIn` where Megatron fell back to torch; returns what is in use.

    ``USING_APEX_OPTIMIZER`` makes DistributedOptimizer look for ``step`` in the groups
    (core/optimizer/distrib_optimizer.py:851).
    """
    import megatron.core.optimizer as optimizer
    from megatron.core.optimizer import distrib_optimizer

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return f"{optimizer.Adam.__module__}.{optimizer.Adam.__name__}"
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = FusedAdamStandIn, False
    distrib_optimizer.Adam = FusedAdamStandIn
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    return "fused stand-in"
