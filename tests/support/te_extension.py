"""`transformer_engine_torch`, the compiled module of Transformer Engine, in plain torch.

Transformer Engine's Python classes are the real ones, which `.ci/overlay te` installs. Only what
its FusedAdam and Float8Tensor call of the compiled module is here. Everything else of it can be
imported and raises when it is called. Adam's update is that of
transformer_engine/common/multi_tensor/adam.cu (2.20.2), with its arithmetic in fp32.
"""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch
from packaging.version import Version

_NAME = "transformer_engine_torch"

#: It needs onnx and onnxscript (40 MB), and the tests export no model.
_ONNX = "transformer_engine.pytorch.onnx_extensions"


class DType(enum.IntEnum):
    """transformer_engine::DType (common/include/transformer_engine/transformer_engine.h)."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


_TORCH = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


class _Named:
    """Something of a module that is imported and not called."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(f"{self._name}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{self._name} is not replaced")

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return ()

    def __int__(self) -> int:
        return 0  # a member of an enum

    def __hash__(self) -> int:
        return hash(self._name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and other._name == self._name

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__


class _Module(types.ModuleType):
    """A module in which every name can be imported."""

    __all__ = ()
    __path__: Sequence[str] = ()

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(f"{self.__name__}.{name}")


class _Uncompiled:
    """Finds the modules that load the compiled one, and lets them load none.

    From 2.4 on that is transformer_engine.common, before it transformer_engine.pytorch.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in ("transformer_engine.common", "transformer_engine.pytorch"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None
        loader = spec.loader
        assert isinstance(loader, importlib.machinery.SourceFileLoader)

        def exec_module(module: Any) -> None:
            source = loader.get_source(name).replace("\n_load_library()\n", "\n")
            exec(compile(source, loader.path, "exec"), module.__dict__)
            if hasattr(module, "load_framework_extension"):
                module.load_framework_extension = lambda framework: None

        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def version() -> str:
    """Return the version of Transformer Engine."""
    return importlib.metadata.version("transformer-engine")


def available() -> bool:
    """Whether Transformer Engine's Python classes are installed without their compiled module."""
    found = [importlib.util.find_spec(name) for name in ("transformer_engine", _NAME)]
    return _NAME in sys.modules or (found[0] is not None and found[1] is None)


def install() -> None:
    """Put the module where Transformer Engine looks for it; before that is imported."""
    if _NAME in sys.modules:
        return
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # common/__init__.py then loads no library of CUDA
    module = _Module(_NAME)
    for value in (
        DType,
        _backends(),
        multi_tensor_adam,
        multi_tensor_adam_param_remainder,
        multi_tensor_scale,
        multi_tensor_scale_tensor,
        multi_tensor_l2norm,
        create_empty_quantized_tensor,
        quantize,
        dequantize,
    ):
        setattr(module, value.__name__, value)
    sys.modules[_NAME] = module
    sys.modules[_ONNX] = _Module(_ONNX)
    sys.meta_path.insert(0, _Uncompiled())  # type: ignore[arg-type]
    # The device of a Float8Tensor is the GPU whatever its data is on (2.1).
    make = torch.Tensor._make_wrapper_subclass
    torch.Tensor._make_wrapper_subclass = lambda *args, device=None, **kwargs: make(  # type: ignore
        *args, device="cpu" if device is not None else None, **kwargs
    )


def _backends() -> type[enum.IntEnum]:
    """The kinds of attention; TE compares them with its own."""
    names = ["NVTE_No_Backend", "NVTE_F16_arbitrary_seqlen", "NVTE_FP8"]
    if Version(version()) < Version("2.20"):
        names.insert(1, "NVTE_F16_max512_seqlen")
    return enum.IntEnum("NVTE_Fused_Attn_Backend", names, start=-1)  # type: ignore[return-value]


def keep_torch_layers() -> None:
    """Let Megatron's blocks end with torch's norm, and route with torch's product, as without TE.

    TE's are compiled.
    """
    block = importlib.import_module("megatron.core.transformer.transformer_block")
    norm = importlib.import_module("megatron.core.transformer.torch_norm")
    block.LayerNormImpl = norm.WrappedTorchNorm
    routing = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    routing.te_general_gemm = None


@torch.no_grad()
def multi_tensor_adam(
    chunk_size: int,
    noop: torch.Tensor,
    lists: Sequence[Sequence[torch.Tensor]],
    *hyper: Any,
) -> None:
    """Adam's update of p, or of the master weights and p."""
    gradients, params, firsts, seconds, *masters = lists
    for i, (gradient, param) in enumerate(zip(gradients, params, strict=True)):
        master = masters[0][i] if masters else param
        new = _update(gradient, master.float(), firsts[i], seconds[i], *hyper)
        master.copy_(new)
        param.copy_(new)


@torch.no_grad()
def multi_tensor_adam_param_remainder(
    chunk_size: int,
    noop: torch.Tensor,
    lists: Sequence[Sequence[torch.Tensor]],
    *hyper: Any,
) -> None:
    """The same with master weights in two halves: bf16, rounded, and the low 16 bits."""
    for gradient, param, first, second, low in zip(*lists, strict=True):
        new = _update(gradient, joined(param, low), first, second, *hyper)
        high, rest = split(new)
        param.copy_(high)
        low.copy_(rest)


def joined(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Join a bf16 weight and its remainder to the fp32 master weight."""
    upper = high.contiguous().view(torch.int16).int() - (low < 0).int()  # rounded up before
    return ((upper << 16) | (low.int() & 0xFFFF)).view(torch.float32)


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split an fp32 master weight into the bf16 weight and its remainder."""
    bits = master.contiguous().view(torch.int32)
    low = bits.to(torch.int16)  # wraps around
    upper = (bits >> 16) + (low < 0).int()
    return upper.to(torch.int16).view(torch.bfloat16), low


def _update(
    gradient: torch.Tensor,
    param: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    adam_w_mode: int,
    bias_correction: int,
    weight_decay: float,
) -> torch.Tensor:
    """Update the moments in place, and return the new weights in fp32."""
    g, m, v = gradient.float(), first.float(), second.float()
    if not adam_w_mode:
        g = g + weight_decay * param
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    first.copy_(m)
    second.copy_(v)
    corrected = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    change = (m / corrected[0]) / ((v / corrected[1]).sqrt() + eps)
    if adam_w_mode:
        change = change + weight_decay * param
    return param - lr * change


@torch.no_grad()
def multi_tensor_scale(
    chunk_size: int, noop: torch.Tensor, lists: Sequence[Sequence[torch.Tensor]], scale: float
) -> None:
    """Write the scaled inputs to the outputs, and note what is not finite."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
        if not bool(source.isfinite().all()):
            noop.fill_(1)


def multi_tensor_scale_tensor(
    chunk_size: int,
    noop: torch.Tensor,
    lists: Sequence[Sequence[torch.Tensor]],
    scale: torch.Tensor,
) -> None:
    """The same with the scale in a tensor."""
    multi_tensor_scale(chunk_size, noop, lists, float(scale))


@torch.no_grad()
def multi_tensor_l2norm(
    chunk_size: int,
    noop: torch.Tensor,
    lists: Sequence[Sequence[torch.Tensor]],
    per_tensor: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of all tensors together, and of each if it is asked for."""
    norms = [torch.linalg.vector_norm(t.float()) for t in lists[0]]
    each = torch.stack(norms) if norms else torch.zeros(1)
    return torch.linalg.vector_norm(each).view(1), each if per_tensor else torch.zeros(0)


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, device: Any, pin_memory: bool
) -> Any:
    """Make a Float8Tensor without values."""
    data = torch.empty(shape, dtype=torch.uint8, device=device)
    return quantizer.create_tensor_from_data(data, fake_dtype=dtype)


@torch.no_grad()
def quantize(source: torch.Tensor, quantizer: Any, out: Any = None, noop: Any = None) -> Any:
    """Write a tensor times the quantizer's scale to a Float8Tensor."""
    if out is None:
        out = quantizer.make_empty(source.shape, dtype=source.dtype, device=source.device)
    target = _TORCH[DType(int(quantizer.dtype))]
    largest = torch.finfo(target).max
    values = (source.float() * quantizer.scale).clamp(-largest, largest).to(target)
    out._data.copy_(values.view(torch.uint8).view(out._data.shape))
    out._scale_inv.copy_(1 / quantizer.scale)
    quantizer.amax.copy_(source.abs().max() if source.numel() else torch.tensor(0.0))
    return out


@torch.no_grad()
def dequantize(tensor: Any, dtype: Any) -> torch.Tensor:
    """Return the values of a Float8Tensor."""
    values = tensor._data.view(_TORCH[DType(int(tensor._fp8_dtype))]).float()
    return (values * tensor._scale_inv).to(_TORCH[DType(int(dtype))])
