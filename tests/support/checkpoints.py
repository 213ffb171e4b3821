"""Small checkpoint directories, written by hand in the formats that Megatron writes."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_ext.checkpoint.state import MARK_KEY

from .groups import group

#: What Megatron's parser gives with few flags (0.18.2 and 0.19.2), as far as it matters.
DEFAULTS: dict[str, Any] = {
    "load": None,
    "save": None,
    "ckpt_step": None,
    "ckpt_format": "torch",
    "exit_on_missing_checkpoint": False,
    "finetune": False,
    "no_load_optim": None,
    "skip_train": False,
    "perform_rl_step": False,
    "pretrained_checkpoint": None,
    "async_save": False,
    "use_checkpoint_args": False,
    "use_mp_args_from_checkpoint_args": False,
    "non_persistent_ckpt_type": None,
    "non_persistent_global_ckpt_dir": None,
    "optimizer": "adam",
    "optimizer_cpu_offload": False,
    "use_distributed_optimizer": True,
    "use_megatron_fsdp": False,
    "use_torch_fsdp2": False,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "tokenizer_type": None,
    "vocab_size": None,
    "padded_vocab_size": None,
    "make_vocab_size_divisible_by": 128,
    "train_iters": 20,
    "train_samples": None,
    "lr_decay_iters": 40,
    "lr_decay_samples": None,
    "lr_warmup_iters": 0,
    "lr_warmup_samples": 0,
    "lr_warmup_fraction": None,
    "rampup_batch_size": None,
    "step_batch_size_schedule": None,
    "phase_transition_iterations": None,
    "dataloader_type": None,
    "global_batch_size": 8,
    "seed": 1234,
    "num_layers": 2,
}


def saved_arguments(root: Path, iteration: int, **changes: Any) -> argparse.Namespace:
    """The arguments inside a checkpoint."""
    given = {"save": str(root), "consumed_train_samples": 8 * iteration, "padded_vocab_size": 128}
    return argparse.Namespace(**{**DEFAULTS, **given, **changes})


def checkpoint(
    root: Path,
    iteration: int = 10,
    *,
    mark: Any = None,
    step: int | None = None,
    format: str = "torch",
    sharding: str = "dp_reshardable",
    optimizer: bool = True,
    args: bool = True,
    release: bool = False,
    changes: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
    lr: float = 2e-3,
) -> Path:
    """Write one iteration and the tracker's file.

    Args:
        root: The directory of ``--load``.
        iteration: Its number.
        mark: Of its phase.
        step: The optimizer's; the iteration's by default.
        format: ``torch`` or ``torch_dist``.
        sharding: Of a ``torch_dist`` checkpoint's distributed optimizer.
        optimizer: Whether there is optimizer state.
        args: Whether there are arguments.
        release: As a converter writes it.
        changes: Of the arguments.
        scheduler: More of the scheduler's state.
        lr: Of the param_groups.
    """
    marks = {} if mark is None else {MARK_KEY: str(mark)}
    groups = [
        group(
            step=iteration if step is None else step, params=[n], wd_mult=float(n), lr=lr, **marks
        )
        for n in (0, 1)
    ]
    state: dict[str, Any] = {"iteration": iteration, "checkpoint_version": 3.0}
    state["opt_param_scheduler"] = {
        "num_steps": 8 * iteration,
        "max_lr": 3e-4,
        **(scheduler or {}),
    }
    if args:
        state["args"] = saved_arguments(root, iteration, **(changes or {}))
    if optimizer:
        state["optimizer"] = {"optimizer": {"param_groups": groups, "state": {}}}
    directory = root / ("release" if release else f"iter_{iteration:07d}")
    if format == "torch":
        (directory / "mp_rank_00").mkdir(parents=True)
        torch.save(state, directory / "mp_rank_00" / "model_optim_rng.pt")
        if args and optimizer and state["args"].use_distributed_optimizer:
            torch.save({"buckets": {}}, directory / "mp_rank_00" / "distrib_optim.pt")
    else:
        directory.mkdir(parents=True)
        if optimizer:
            state["optimizer"]["param_state_sharding_type"] = sharding
        state["content_metadata"] = {"distrib_optim_sharding_type": sharding}
        torch.save(state, directory / "common.pt")
        text = json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
        (directory / "metadata.json").write_text(text)
        index = Metadata(state_dict_metadata={}, storage_data={})
        (directory / ".metadata").write_bytes(pickle.dumps(index))
    (root / "latest_checkpointed_iteration.txt").write_text(
        "release" if release else str(iteration)
    )
    return root


def checksums(root: Path) -> dict[str, str]:
    """Of every file below a directory; directories by name."""
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else ""
        for p in sorted(root.rglob("*"))
    }
