"""Resume runs of Megatron-Bridge with other hyperparameters, and keep the Adam moments.

`resume_with` prepares a `ConfigContainer`; Bridge's `pretrain` then does the rest. Nothing of
Bridge is replaced: the optimizer is built by Megatron's own function, and the counters of a phase
are set by a checkpoint manager, which Bridge lets a config name.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..host.bridge_contract import CHECKPOINTING, INSTANTIATING, check_bridge
from ..policy import yaml_file
from ..policy.policy import ResumePolicy
from ..policy.request import Request
from . import enabled
from .bridge_config import MANAGER, choose, refuse_unsupported
from .session import require_built


def resume_with(
    cfg: Any,
    *,
    policy: ResumePolicy | str | Path | None = None,
    report_dir: str | Path | None = None,
    start: str | Path | None = None,
    guard: bool = True,
    verify: bool = False,
) -> enabled.Enabled:
    """Let a Megatron-Bridge run resume by a policy.

    Call it on every rank, with a complete config, before Bridge's ``pretrain`` or ``finetune``. It
    sets `checkpoint.custom_manager_class`; with `start` also `checkpoint.load` and
    `checkpoint.ckpt_step`. Either everything is set or an error is raised and nothing is.

    Args:
        cfg: A `megatron.bridge.training.config.ConfigContainer`.
        policy: The policy, or a YAML file that has it; the default keeps no hyperparameter.
        report_dir: Where rank 0 writes the resume report, or None.
        start: The directory from which a phase starts. `checkpoint.save` is then the phase's own
            directory, and is loaded instead once it has a checkpoint.
        guard: Whether the first resumed step is checked against the plan.
        verify: Whether a load compares the CRC32 of everything that it reads.

    Returns:
        An object that has the resume report after the load.

    Raises:
        HostError: Bridge, or a part of the config, cannot go with a selective resume; or an earlier
            call had another policy.
        PolicyError: The policy cannot be read, or the directories contradict each other.
        CheckpointError: `start` has no checkpoint, or a directory cannot be looked into.
    """
    check_bridge()
    if isinstance(policy, str | Path):
        policy = yaml_file.read(policy, "policy")
    policy = policy or ResumePolicy()
    checkpoint = cfg.checkpoint
    chosen = choose(checkpoint, None if start is None else str(start))
    # Without `start` the text stays as it is: a URL is not a path.
    load = checkpoint.load if start is None else str(chosen.load)
    refuse_unsupported(cfg, policy, load)
    request = Request(
        policy=policy,
        report_dir=Path(report_dir) if report_dir else None,
        where=chosen.where,
        guard=guard,
        verify=verify,
    )
    answers = enabled.enable(request)
    importlib.import_module(INSTANTIATING).register_allowed_target_prefix(
        MANAGER.rpartition(".")[0]
    )
    checkpoint.custom_manager_class = MANAGER
    checkpoint.load = load
    if chosen.where == "own":
        checkpoint.ckpt_step = None  # it says where the phase starts; a restart loads the newest
    return answers


class CheckpointManager:
    """Bridge's own checkpoint manager, with the counters of a phase after the load.

    Bridge's `create_checkpoint_manager` makes it of `checkpoint.custom_manager_class`. Its data
    iterators are made after the load.

    Args:
        checkpoint_config: The section `checkpoint` of the config. Its `custom_manager_class` is
            set to None, so that a ``run_config.yaml`` can be used without this package.
    """

    def __init__(self, checkpoint_config: Any) -> None:
        checkpoint_config.custom_manager_class = None
        module = importlib.import_module(CHECKPOINTING)
        self._bridge = module.DefaultCheckpointManager(checkpoint_config)

    @property
    def checkpointing_context(self) -> dict[str, Any]:
        """The strategies that Bridge caches between saves and loads."""
        context: dict[str, Any] = self._bridge.checkpointing_context
        return context

    def save(self, ctx: Any, callback_manager: Any = None) -> None:
        """Save a checkpoint as Bridge does."""
        self._bridge.save(ctx, callback_manager)

    def load(self, ctx: Any) -> tuple[int, int]:
        """Load a checkpoint as Bridge does, and set the counters with which the phase goes on.

        Args:
            ctx: Bridge's `CheckpointLoadContext`. The train_state of its state is replaced.

        Returns:
            The iteration, and the floating-point operations so far.

        Raises:
            HostError: The optimizer was not built with this package's class.
            CheckpointError: The checkpoint has no optimizer state.
        """
        require_built()
        wanted = ctx.state.cfg.checkpoint.load_optim
        try:
            _, operations = self._bridge.load(ctx)
        except KeyError as e:
            if e.args != ("optimizer",):
                raise
            raise _no_optimizer_state(ctx.state.cfg.checkpoint.load) from e
        answers = enabled.Enabled()
        if wanted and answers.report is None:
            raise _no_optimizer_state(ctx.state.cfg.checkpoint.load)
        before = ctx.state.train_state
        after = answers.counters(
            iteration=before.step,
            consumed_train_samples=before.consumed_train_samples,
            skipped_train_samples=before.skipped_train_samples,
            consumed_valid_samples=before.consumed_valid_samples,
        )
        ctx.state.train_state = dataclasses.replace(
            before,
            step=after.iteration,
            consumed_train_samples=after.consumed_train_samples,
            skipped_train_samples=after.skipped_train_samples,
            consumed_valid_samples=after.consumed_valid_samples,
        )
        return after.iteration, operations

    def finalize_async_saves(
        self, state: Any, blocking: bool = False, terminate: bool = False
    ) -> None:
        """Finish asynchronous saves as Bridge does."""
        self._bridge.finalize_async_saves(state, blocking, terminate)


def _no_optimizer_state(load: str | None) -> CheckpointError:
    return CheckpointError(
        f"checkpoint.load={load}: no optimizer state was loaded, and the policy keeps the moments. "
        "A release checkpoint, or one saved with checkpoint.save_optim=False, has none: set "
        "checkpoint.load_optim to False to start with a new optimizer"
    )
