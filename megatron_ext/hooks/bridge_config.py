"""Choose what a Megatron-Bridge run loads, and refuse what a selective resume cannot serve."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ..checkpoint import directories
from ..errors import CheckpointError, HostError, PolicyError
from ..host.bridge_contract import CHECKPOINT_FILES, CONFIG
from ..policy.policy import ResumePolicy

#: The manager that `hooks.bridge.resume_with` names in a config.
MANAGER = "megatron_ext.bridge.CheckpointManager"

_NAMES = directories.Names(
    "checkpoint.load",
    "checkpoint.save",
    "start",
    "checkpoint.non_persistent_global_ckpt_dir",
)


def choose(checkpoint: Any, start: str | None) -> directories.Directories:
    """Choose the directory to load, as ``--selective-from`` does.

    Args:
        checkpoint: The section `checkpoint` of the config.
        start: The directory from which a phase starts, or None.

    Raises:
        PolicyError: The directories contradict each other.
        CheckpointError: `start` has no checkpoint, or a directory cannot be looked into.
    """
    load, save = checkpoint.load, checkpoint.save
    if start is not None and save is not None and load == start:
        load = None  # an earlier call has chosen it
    elsewhere = checkpoint.non_persistent_global_ckpt_dir
    chosen = directories.choose(load, save, start, elsewhere, names=_NAMES, found=_exists)
    if chosen.where == "start" and not _exists(start):
        raise CheckpointError(
            f"start={start}: a phase begins from a checkpoint, and Megatron-Bridge finds none "
            "there. Name the directory of the earlier phase, that is its checkpoint.save"
        )
    return chosen


def _exists(directory: str | Path | None) -> bool:
    """Whether Bridge finds a checkpoint; Megatron's tracker file is the last that it writes."""
    path = None if directory is None else str(directory)
    return bool(importlib.import_module(CHECKPOINT_FILES).checkpoint_exists(path))


def refuse_unsupported(cfg: Any, policy: ResumePolicy, load: str | None) -> None:
    """Raise for a part of the config that drops the optimizer, or that is not tested.

    Args:
        cfg: The config.
        policy: The policy.
        load: The directory that Bridge is to load.

    Raises:
        HostError, PolicyError: The error names the field and the way out.
    """
    checkpoint = cfg.checkpoint
    if checkpoint.finetune:
        raise HostError(
            "checkpoint.finetune=True: Bridge then drops the optimizer and the counters of the "
            "checkpoint, and there is nothing to resume. Set it to False and give the policy "
            "reset_iteration and reset_dataloader, which keep the moments; or train without "
            "resume_with"
        )
    if cfg.peft is not None:
        raise HostError(
            f"peft={type(cfg.peft).__name__}: the optimizer of a PEFT run has the adapters' "
            "parameters, whose resume is not tested. Train without resume_with, or set peft to None"
        )
    if not checkpoint.load_optim and policy.needs_optimizer:
        asked = ", ".join(policy.operations) or "values from the checkpoint"
        raise PolicyError(
            f"checkpoint.load_optim=False with {asked}: this needs the optimizer state of the "
            "checkpoint, which Bridge then leaves out. Set checkpoint.load_optim to True, or leave "
            "the policy out"
        )
    if checkpoint.pretrained_checkpoint is not None and not _exists(load):
        raise HostError(
            f"checkpoint.pretrained_checkpoint={checkpoint.pretrained_checkpoint}: Bridge loads "
            f"it, because checkpoint.load={load} has no checkpoint, and drops its optimizer. Give "
            "the directory as start to begin from it with its moments, and set "
            "pretrained_checkpoint to None; or train without resume_with"
        )
    if cfg.inprocess_restart is not None and cfg.inprocess_restart.enabled:
        raise HostError(
            "inprocess_restart.enabled=True: Bridge then loads again in the same process, where "
            "the directory of the phase was chosen before it had a checkpoint. Set it to False: a "
            "restart of the job continues the phase"
        )
    if cfg.dist.use_torch_fsdp2:
        raise HostError(
            "dist.use_torch_fsdp2=True: torch FSDP2 does not load through the optimizer's "
            "load_state_dict. Set it to False, or train without resume_with"
        )
    if checkpoint.non_persistent_ckpt_type == "local":
        raise HostError(
            "checkpoint.non_persistent_ckpt_type='local': a local checkpoint takes precedence over "
            "checkpoint.load and is not tested with a selective resume. Set it to 'global' or None"
        )
    if checkpoint.custom_manager_class not in (None, MANAGER):
        raise HostError(
            f"checkpoint.custom_manager_class={checkpoint.custom_manager_class}: resume_with sets "
            "the counters of a phase with a manager of its own. Set it to None; or call "
            "megatron_ext.enable instead, and its counters() in the load of your manager"
        )
    _refuse_energon(cfg, policy)


def _refuse_energon(cfg: Any, policy: ResumePolicy) -> None:
    """Raise if Energon's position in the data would not follow the policy.

    Bridge restores it whenever the iteration is not 0 (training/setup.py:483).
    """
    energon = importlib.import_module(CONFIG).EnergonDatasetConfig
    if isinstance(cfg.dataset, energon) and policy.reset_iteration != policy.reset_dataloader:
        found = "reset_iteration" if policy.reset_iteration else "reset_dataloader"
        other = "reset_dataloader" if policy.reset_iteration else "reset_iteration"
        raise PolicyError(
            f"{found} with an Energon dataset: Bridge restores Energon's position in the data at "
            f"every iteration but 0, so that one is reset with the other. Add {other} to the "
            "policy, or leave both out"
        )
