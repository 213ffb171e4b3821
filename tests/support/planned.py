"""Command lines for `python -m megatron_ext plan`, as `tests/support/harness.py` is configured."""

from __future__ import annotations

from .harness import GLOBAL_BATCH, Hyper


def words(hyper: Hyper) -> list[str]:
    """Megatron's arguments for the same hyperparameters."""
    values = {
        "lr": hyper.lr,
        "min-lr": hyper.min_lr,
        "weight-decay": hyper.weight_decay,
        "adam-beta1": hyper.betas[0],
        "adam-beta2": hyper.betas[1],
        "adam-eps": hyper.eps,
        "clip-grad": hyper.clip_grad,
        "train-iters": hyper.train_iters,
        "lr-decay-iters": hyper.train_iters,
        "lr-warmup-iters": hyper.warmup_iters,
        "lr-decay-style": hyper.decay_style,
        "weight-decay-incr-style": hyper.wd_incr_style,
        "start-weight-decay": hyper.start_wd,
        "end-weight-decay": hyper.end_wd,
        "decoupled-lr": hyper.decoupled_lr,
        "decoupled-min-lr": hyper.decoupled_min_lr,
        "global-batch-size": GLOBAL_BATCH,
    }
    return [w for k, v in values.items() if v is not None for w in (f"--{k}", str(v))]
