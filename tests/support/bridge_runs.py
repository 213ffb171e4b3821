"""Small runs of Megatron-Bridge's own `pretrain`, on the ranks of the current process group."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.support.text import VOCABULARY, corpus

GLOBAL_BATCH = 4
MOMENT_KEYS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Bridge:
    """What a run's `ConfigContainer` is made of.

    Args:
        train_iters: Last iteration.
        load: `checkpoint.load`.
        save: `checkpoint.save`.
        lr: `optimizer.lr`; `optimizer.min_lr` is a tenth of it.
        parallel: The kind of model parallelism of size 2, ``tensor`` or ``pipeline``.
        reshardable: `checkpoint.dist_ckpt_optim_fully_reshardable`.
        decay_iters: `scheduler.lr_decay_iters`, which is that of all phases of a test.
        changes: Section and field, dotted -> value.
        data: The corpus, which the process of the tests has written.
    """

    train_iters: int
    load: str | None = None
    save: str | None = None
    lr: float = 1e-2
    parallel: str = ""
    reshardable: bool = False
    decay_iters: int = 20
    changes: dict[str, Any] = field(default_factory=dict)
    data: str = field(default_factory=corpus)


def config(run: Bridge) -> Any:
    """A GPT of two layers, without any fusion."""
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
    from megatron.bridge.training import config as c
    from megatron.core.distributed import DistributedDataParallelConfig

    cfg = c.ConfigContainer(
        model=GPTModelProvider(
            transformer_layer_spec=local_layer_spec,
            num_layers=2,
            hidden_size=16,
            ffn_hidden_size=32,
            num_attention_heads=2,
            seq_length=8,
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            apply_rope_fusion=False,
            cross_entropy_loss_fusion=False,
            persist_layer_norm=False,
            make_vocab_size_divisible_by=8,
            vocab_size=VOCABULARY + 1,
        ),
        train=c.TrainingConfig(
            train_iters=run.train_iters, global_batch_size=GLOBAL_BATCH, micro_batch_size=2
        ),
        validation=c.ValidationConfig(eval_iters=0, eval_interval=1000),
        optimizer=c.OptimizerConfig(
            optimizer="adam",
            lr=run.lr,
            min_lr=run.lr / 10,
            weight_decay=0.1,
            bf16=True,
            use_distributed_optimizer=True,
        ),
        scheduler=c.SchedulerConfig(
            lr_decay_style="linear",
            lr_warmup_iters=1,
            lr_decay_iters=run.decay_iters,
            start_weight_decay=0.1,
            end_weight_decay=0.1,
            override_opt_param_scheduler=True,
        ),
        ddp=DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True),
        dataset=c.GPTDatasetConfig(
            random_seed=1,
            seq_length=8,
            data_path=[run.data],
            path_to_cache=f"{run.data}-cache",
            split="98,1,1",
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            dataloader_type="single",
            num_workers=0,
            skip_getting_attention_mask_from_dataset=False,
        ),
        logger=c.LoggerConfig(log_interval=1, logging_level=50),
        tokenizer=c.TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCABULARY),
        checkpoint=c.CheckpointConfig(
            load=run.load,
            save=run.save,
            save_interval=1000,
            ckpt_format="torch_dist",
            async_strategy="mcore",
            use_persistent_ckpt_worker=False,
            fully_parallel_save=True,
            dist_ckpt_optim_fully_reshardable=run.reshardable,
        ),
        rng=c.RNGConfig(seed=1),
        dist=c.DistributedInitConfig(
            distributed_backend="gloo", use_gloo_process_groups=run.reshardable
        ),
        mixed_precision="bf16_mixed",
    )
    if run.parallel:
        setattr(cfg.model, f"{run.parallel}_model_parallel_size", 2)
    for name, value in run.changes.items():
        section, _, attribute = name.rpartition(".")
        setattr(getattr(cfg, section) if section else cfg, attribute, value)
    return cfg


def train(
    run: Bridge,
    resume: dict[str, Any] | None = None,
    tamper: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Call `pretrain`.

    Args:
        run: What is trained.
        resume: Arguments of `megatron_ext.bridge.resume_with`; None for stock Bridge.
        tamper: Values that every param_group is given before the first step.
    """
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    seen = Seen(tamper or {})
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        cfg = config(run)
        if resume is not None:
            from megatron_ext import bridge

            bridge.resume_with(cfg, **resume)
        pretrain(cfg, forward_step, callbacks=seen.manager())
    return {"log": log.getvalue(), "steps": seen.steps, "begin": seen.begin, "end": seen.end}


class Seen:
    """What callbacks see of a run: its state before the first step, and each step's position."""

    def __init__(self, tamper: dict[str, Any]) -> None:
        self._tamper = tamper
        self.begin: dict[str, Any] = {}
        self.end: dict[str, Any] = {}
        self.steps: list[dict[str, Any]] = []

    def manager(self) -> Any:
        from megatron.bridge.training.callbacks import CallbackManager

        manager = CallbackManager()
        handlers: dict[str, Callable[[Any], None]] = {
            "on_train_start": self._begin,
            "on_train_step_start": self._step,
            "on_train_end": self._end,
        }
        for event, handler in handlers.items():
            manager.register(event, handler)
        return manager

    def _begin(self, context: Any) -> None:
        self.begin = state_of(context)
        for group in groups_of(context.optimizer):
            group.update(self._tamper)

    def _end(self, context: Any) -> None:
        self.end = state_of(context)

    def _step(self, context: Any) -> None:
        at = context.state.train_state
        self.steps.append(
            {
                "iteration": at.step,
                "consumed": at.consumed_train_samples,
                "lr": [group["lr"] for group in groups_of(context.optimizer)],
            }
        )


def groups_of(optimizer: Any) -> list[dict[str, Any]]:
    members = getattr(optimizer, "chained_optimizers", [optimizer])
    return [group for member in members for group in member.optimizer.param_groups]


def state_of(context: Any) -> dict[str, Any]:
    """This rank's moments, weights, param_groups and counters, as arrays and numbers."""
    members = getattr(context.optimizer, "chained_optimizers", [context.optimizer])
    return {
        "moments": [
            {key: member.optimizer.state[param][key].numpy().copy() for key in MOMENT_KEYS}
            for member in members
            for group in member.optimizer.param_groups
            for param in group["params"]
            if param in member.optimizer.state
        ],
        "groups": [
            {k: v for k, v in group.items() if isinstance(v, (str, int, float, tuple))}
            for group in groups_of(context.optimizer)
        ],
        "num_steps": context.scheduler.num_steps,
        "iteration": context.state.train_state.step,
        "consumed": context.state.train_state.consumed_train_samples,
        "class": type(members[0]).__name__,
        "weights": {
            name: param.detach().to(torch.float32).numpy().copy()
            for chunk in context.model
            for name, param in chunk.named_parameters()
        },
    }
