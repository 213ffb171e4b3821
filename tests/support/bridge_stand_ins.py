"""Stand-ins for what Megatron-Bridge imports and no test calls.

Bridge imports Transformer Engine, NVIDIA Resiliency Extension, Megatron Energon, ModelOpt and
`datasets` at the top of its modules, whether or not a run uses them. They need a GPU, or are large.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

#: What Megatron-Bridge 0.6.2 imports, and the tests do without.
PACKAGES = (
    "transformer_engine",
    "nvidia_resiliency_ext",
    "megatron.energon",
    "modelopt",
    "datasets",
)


#: Functions whose result Bridge uses in every run, and that have nothing to do in one of a test.
NOTHING = ("get_tensor_shapes_adjust_fn_for_distillation",)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


class _Type(type):
    def __getitem__(cls, item: Any) -> type:
        return cls

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Type(name, (_Class,), {})


class _Class(metaclass=_Type):
    """Any class or function of an absent package: a base class, an annotation or a decorator."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, function: Any) -> Any:
        return function


class _Module(ModuleType):
    __path__: Sequence[str] = ()
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        new = _Type(name, (_Class,), {"__module__": self.__name__})
        found = _nothing if name in NOTHING else new
        setattr(self, name, found)
        return found


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, name: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not any(name == one or name.startswith(f"{one}.") for one in PACKAGES):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def available() -> bool:
    """Whether Megatron-Bridge is installed; imports nothing of it."""
    # find_spec of a module below a package that is missing raises.
    return importlib.util.find_spec("megatron") is not None and (
        importlib.util.find_spec("megatron.bridge") is not None
    )


def install() -> None:
    """Make Bridge importable. Megatron is imported first: it has to see what is really there."""
    for name in ("megatron.core.optimizer", "megatron.core.models.gpt.gpt_layer_specs"):
        importlib.import_module(name)
    importlib.import_module("megatron.training.training")
    sys.meta_path.append(_Finder())
