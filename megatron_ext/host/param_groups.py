"""Make the param_groups of a run with Megatron's own function, without a model.

The function reads names, shapes and a few attributes of parameters. Tensors without storage (the
meta device of torch) have all of it. The function has the same name and parameters in megatron-core
0.16.1, 0.17.1, 0.18.2 and 0.19.2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from packaging.version import Version

from ..errors import PlanError
from .contract import CORE, megatron_version

#: What a LanguageModule marks (core/models/common/language_module/language_module.py:224, 0.19.2).
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
#: Fields of OptimizerConfig that decide about the groups.
_FIELDS = (
    *("optimizer", "lr", "min_lr", "decoupled_lr", "decoupled_min_lr", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_eps", "apply_wd_to_qk_layernorm"),
)


@dataclass(frozen=True)
class MadeGroup:
    """A param_group as Megatron's function makes it.

    Args:
        values: Its keys, without ``params`` and those that the optimizer adds.
        names: The names of its parameters.
    """

    values: dict[str, Any]
    names: tuple[str, ...]


def made_groups(
    parameters: Sequence[tuple[str, tuple[int, ...], bool]], args: Any
) -> tuple[tuple[MadeGroup, ...], ...]:
    """Make the param_groups of an Adam, as `get_megatron_optimizer` does.

    See core/optimizer/__init__.py:299 and :1075, and training/training.py:2117, 0.19.2.

    Args:
        parameters: Name, unsharded shape and whether it belongs to an expert, of each parameter.
        args: Megatron's arguments.

    Returns:
        For each optimizer of the chain its groups: that of the dense parameters, then that of the
        experts if they are spread over ranks of their own.

    Raises:
        PlanError: They cannot be made here; the reason.
    """
    core = importlib.import_module(CORE)
    if args.optimizer != "adam":
        raise PlanError(f"--optimizer {args.optimizer} makes a chain of other optimizers")
    fields = {f.name for f in dataclasses.fields(core.OptimizerConfig)}
    config = core.OptimizerConfig(
        **{n: getattr(args, n) for n in _FIELDS if n in fields and hasattr(args, n)}
    )
    overrides = dict(core.get_standard_config_overrides(config))
    if getattr(args, "use_mup", False):
        overrides |= _mup_overrides(core, config, args)
    apart = _experts_are_apart(args)
    held = [(name, _parameter(name, shape, expert and apart)) for name, shape, expert in parameters]
    chunk = SimpleNamespace(named_parameters=lambda: iter(held))
    with _one_rank():
        made = core._get_param_groups([chunk], config, overrides)
    names = {id(parameter): name for name, parameter in held}
    groups = [
        MadeGroup(
            {k: v for k, v in group.items() if k != "params"},
            tuple(names[id(p)] for p in group["params"]),
        )
        for group in made
    ]
    dense, experts = (
        tuple(g for g in groups if bool(g.values["is_expert_parallel"]) is parallel)
        for parallel in (False, True)
    )
    return (dense, experts) if experts else (dense,)


def _mup_overrides(core: Any, config: Any, args: Any) -> dict[Any, Any]:
    """Return MuP's overrides; the width is TransformerConfig's (transformer_config.py:2197)."""
    make = getattr(core, "get_mup_config_overrides", None)
    width = getattr(args, "hidden_size", None)
    if make is None or not width:
        raise PlanError("--use-mup needs the hidden size, and megatron-core 0.17 or later")
    base = getattr(args, "mup_base_hidden_size", None) or width
    found: dict[Any, Any] = make(config, width / base, config.optimizer)
    return found


def _experts_are_apart(args: Any) -> bool:
    """Whether experts have process groups of their own (core/tensor_parallel/layers.py:961)."""
    if (getattr(args, "expert_model_parallel_size", None) or 1) > 1:
        return True
    tensor = getattr(args, "tensor_model_parallel_size", None) or 1
    expert = getattr(args, "expert_tensor_parallel_size", None) or tensor
    return bool(expert != tensor) and Version(megatron_version()) >= Version("0.19")


def _parameter(name: str, shape: tuple[int, ...], expert: bool) -> Any:
    """Make a parameter without storage, with the attributes that the functions above read."""
    import torch

    out: Any = torch.nn.Parameter(torch.empty(shape, device="meta"), requires_grad=True)
    out.allreduce = not expert
    out.is_embedding_or_output_parameter = name in VOCABULARY
    # For MuP only (language_module.py:237).
    out.is_embedding_parameter = name.startswith("embedding.") or name == VOCABULARY[1]
    return out


@contextlib.contextmanager
def _one_rank() -> Iterator[None]:
    """Make a process group of this process: Megatron's function compares the groups of all ranks.

    Raises:
        PlanError: The process belongs to a group of several, or cannot make one.
    """
    import torch.distributed as dist

    if dist.is_initialized():
        if dist.get_world_size() > 1:
            raise PlanError("this process is one of several ranks, which would have to take part")
        yield
        return
    try:
        store = dist.HashStore()  # type: ignore[attr-defined]  # of torch._C, without a stub
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    except RuntimeError as e:
        raise PlanError(f"torch.distributed cannot make a group of one process: {e}") from e
    try:
        yield
    finally:
        dist.destroy_process_group()
