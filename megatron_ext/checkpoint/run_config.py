"""Read what Megatron-Bridge saves in place of Megatron's arguments, by Megatron's names.

Bridge writes ``run_config.yaml`` and ``train_state.pt`` beside the tensors
(training/checkpointing.py:1440-1470, 0.6.2), and no ``args``. Of both only plain values of known
names are taken; what a config describes by a class or a function is unknown.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from .store import read_file, unexpected
from .torch_file import load_torch

RUN_CONFIG, TRAIN_STATE = "run_config.yaml", "train_state.pt"
#: Characters of a config. One of a recipe has some 30,000.
_LARGEST = 1 << 20

#: Section -> kind of value -> names, which are Megatron's too unless `_RENAMED`.
_TAKEN: Mapping[str, Mapping[type, str]] = {
    "model": {
        int: "tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
        "virtual_pipeline_model_parallel_size expert_model_parallel_size "
        "expert_tensor_parallel_size num_layers hidden_size ffn_hidden_size num_attention_heads "
        "num_query_groups num_moe_experts seq_length vocab_size make_vocab_size_divisible_by "
        "mup_base_hidden_size",
        bool: "moe_grouped_gemm use_mup",
    },
    "optimizer": {
        float: "lr min_lr decoupled_lr decoupled_min_lr weight_decay adam_beta1 adam_beta2 "
        "adam_eps clip_grad",
        str: "optimizer",
        bool: "bf16 fp16 use_distributed_optimizer decoupled_weight_decay apply_wd_to_qk_layernorm",
    },
    "scheduler": {
        float: "lr_warmup_init lr_warmup_fraction start_weight_decay end_weight_decay",
        int: "lr_decay_iters lr_decay_samples lr_warmup_iters lr_warmup_samples "
        "lr_wsd_decay_iters lr_wsd_decay_samples",
        str: "lr_decay_style lr_wsd_decay_style weight_decay_incr_style",
    },
    "train": {
        int: "global_batch_size micro_batch_size train_iters train_samples",
        list: "rampup_batch_size",
        str: "step_batch_size_schedule",
    },
    "ddp": {int: "num_distributed_optimizer_instances"},
    "dist": {bool: "use_tp_pp_dp_mapping"},
    "rng": {int: "seed"},
    "checkpoint": {bool: "fully_parallel_save", str: "save"},
}
_RENAMED = {"num_moe_experts": "num_experts", "fully_parallel_save": "ckpt_fully_parallel_save"}
_COUNTERS = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")


def arguments(directory: Path) -> dict[str, Any]:
    """Read the arguments of a Megatron-Bridge checkpoint; empty without Bridge's files.

    Args:
        directory: The directory of the iteration.

    Raises:
        CheckpointError: A file is damaged or of another kind. The error names it.
    """
    found: dict[str, Any] = {}
    if (path := directory / RUN_CONFIG).is_file():
        found |= _of_config(read_file(path, _load), path)
    if (path := directory / TRAIN_STATE).is_file():
        state = read_file(path, load_torch)
        if not isinstance(state, Mapping):
            raise unexpected(path, f"a {type(state).__name__}", "a dict of Bridge's counters")
        found |= {n: v for n in _COUNTERS if _is(v := state.get(n), int)}
    return found


def _of_config(config: Any, path: Path) -> dict[str, Any]:
    if not isinstance(config, Mapping):
        raise unexpected(path, f"a {type(config).__name__}", "a mapping of Bridge's config")
    found: dict[str, Any] = {}
    for section, kinds in _TAKEN.items():
        values = config.get(section)
        if not isinstance(values, Mapping):
            continue
        for kind, names in kinds.items():
            taken = {n: v for n in names.split() if _is(v := values.get(n), kind)}
            found |= {_RENAMED.get(name, name): value for name, value in taken.items()}
    model = config.get("model")
    if isinstance(model, Mapping) and model.get("should_pad_vocab") is False:
        # Otherwise Bridge pads the vocabulary when it builds the model, and does not save the size.
        found |= {"padded_vocab_size": found["vocab_size"]} if "vocab_size" in found else {}
    return found


def _is(value: Any, kind: type) -> bool:
    """Whether a value is of a kind; a whole number is also a float, and a bool is neither."""
    if kind is list:
        return isinstance(value, list) and all(_is(one, int) for one in value)
    kinds = (int, float) if kind is float else (kind,)
    return isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))


def _load(file: BinaryIO) -> Any:
    with io.TextIOWrapper(file, encoding="utf-8") as lines:
        text = lines.read(_LARGEST + 1)
    if len(text) > _LARGEST:
        raise ValueError(f"expected at most {_LARGEST} characters, found more")
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """Loader of plain data. A value with an unknown tag is None, whatever the tag says."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Do not merge: Bridge writes no merge key, and a few of them can make a huge mapping."""


_Loader.add_constructor(None, lambda loader, node: None)
