"""A training script with its own loop, which binds Megatron's functions as RL frameworks do.

slime and miles import the builder and `load_checkpoint` by name before anything of a user's runs
(slime/backends/megatron_utils/model.py:18 and checkpoint.py:7), call the user's function when
Megatron is initialized (initialize.py:100), and make steps of their own (model.py:681).

Environment:
    ENABLE: ``import`` for `megatron_ext.autoenable`, ``call`` for `megatron_ext.enable` with the
        policy in MEGATRON_EXT_POLICY, ``late`` for that call after the optimizer was built; without
        it stock Megatron runs.
    COUNTERS: whether the loop asks for its counters.
    STEP_AGAIN: whether the scheduler steps once more after the load, as in miles
        (miles/backends/megatron_utils/model.py:989).
"""

import importlib
import os
import runpy
from functools import partial
from pathlib import Path

import torch
from megatron.core import mpu
from megatron.core.enums import ModelType
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import arguments as megatron_arguments
from megatron.training import get_args
from megatron.training.checkpointing import load_checkpoint, save_checkpoint
from megatron.training.initialize import initialize_megatron
from megatron.training.training import (
    get_megatron_optimizer_config,
    get_model,
    get_optimizer_param_scheduler,
)

import megatron_ext.demo


def custom_init(args):
    """What slime calls ``--custom-megatron-init-path``."""
    how = os.environ.get("ENABLE")
    if how == "import":
        return importlib.import_module("megatron_ext.autoenable").enabled
    if how is None:
        return None
    policy = os.environ["MEGATRON_EXT_POLICY"]
    return megatron_ext.enable(policy, report_dir=os.environ.get("MEGATRON_EXT_REPORT"))


def batches(samples, args):
    """The micro-batches of a step on this rank; they depend on the data position only."""
    ranks, rank = mpu.get_data_parallel_world_size(), mpu.get_data_parallel_rank()
    for first in range(samples, samples + args.global_batch_size, args.micro_batch_size * ranks):
        at = first + rank * args.micro_batch_size
        rows = [
            torch.randint(
                0, 100, (args.seq_length + 1,), generator=torch.Generator().manual_seed(i)
            )
            for i in range(at, at + args.micro_batch_size)
        ]
        print(f"TOKENS rank {torch.distributed.get_rank()}: {[at]}", flush=True)
        yield torch.stack(rows)


def forward_step(data_iterator, model):
    rows = next(data_iterator)
    positions = torch.arange(rows.shape[1] - 1).expand(len(rows), -1)
    output = model(rows[:, :-1].contiguous(), positions, None, labels=rows[:, 1:].contiguous())
    return output, partial(loss_of)


def loss_of(output):
    loss = output.float().mean()
    return loss, {"loss": loss.detach().clone()}


def train_step(model, optimizer, scheduler, samples):
    args = get_args()
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    reduced = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=batches(samples, args),
        model=model[0],
        num_microbatches=args.global_batch_size
        // (args.micro_batch_size * mpu.get_data_parallel_world_size()),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=False,
    )
    print(f"LR: {optimizer.param_groups[0]['lr']!r}", flush=True)
    assert optimizer.step()[0]
    scheduler.step(increment=args.global_batch_size)
    loss = torch.stack([one["loss"] for one in reduced]).mean()
    print(f"LOSS rank {torch.distributed.get_rank()}: {loss.item()!r}", flush=True)


def main():
    if hasattr(megatron_arguments, "parse_and_validate_args"):  # 0.17 parses them below
        megatron_arguments.parse_and_validate_args()
    initialize_megatron()
    args = get_args()
    late = os.environ.get("ENABLE") == "late"
    enabled = None if late else custom_init(args)
    script = Path(megatron_ext.demo.__file__).parent / "pretrain_gpt.py"
    provider = runpy.run_path(str(script))["model_provider"]
    model = get_model(provider, ModelType.encoder_or_decoder)
    config, overrides = get_megatron_optimizer_config(args)
    optimizer = get_megatron_optimizer(config, model, config_overrides=overrides)
    if late:
        custom_init(args)
    scheduler = get_optimizer_param_scheduler(optimizer)
    iteration = samples = 0
    if args.load:
        iteration, _ = load_checkpoint(model, optimizer, scheduler)
        samples = iteration * args.global_batch_size
        if os.environ.get("STEP_AGAIN"):
            scheduler.step(increment=samples)
    if os.environ.get("COUNTERS"):
        counters = enabled.counters(iteration=iteration, consumed_train_samples=samples)
        iteration, samples = counters.iteration, counters.consumed_train_samples
    while iteration < args.train_iters:
        iteration += 1
        print(f"ITERATION: {iteration}", flush=True)
        train_step(model, optimizer, scheduler, samples)
        samples += args.global_batch_size
    if args.save:
        args.consumed_train_samples = samples
        save_checkpoint(iteration, model, optimizer, scheduler, 0)


if __name__ == "__main__":
    main()
