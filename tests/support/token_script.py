"""The training script of the demo, with the token ids and the exact losses in its log.

What Megatron logs as the second loss of a run is the mean of the first two. With
KILL_AT_MICRO_BATCH=N in the environment every rank kills itself as it draws the N-th.
"""

import os
import runpy
import signal
from pathlib import Path

import torch
from megatron.training import training

import megatron_ext

SCRIPT = Path(megatron_ext.__file__).parent / "demo" / "pretrain_gpt.py"


def with_printed_training_data(build):
    """Around Megatron's loaders: each training micro-batch is printed as it is drawn."""

    def built(*args, **kwargs):
        train, *others = build(*args, **kwargs)
        return (None if train is None else Printed(train), *others)

    return built


class Printed:
    """A data loader that prints what it gives."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        kill_at = int(os.environ.get("KILL_AT_MICRO_BATCH", "0"))
        for number, batch in enumerate(self.loader, 1):
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            for row in batch["tokens"].tolist():
                print(f"TOKENS rank {torch.distributed.get_rank()}: {row}", flush=True)
            yield batch


def with_printed_losses(train_step):
    """Around Megatron's step: the loss of each iteration as it is."""

    def stepped(*args, **kwargs):
        losses, *others = train_step(*args, **kwargs)
        print(f"LOSS rank {torch.distributed.get_rank()}: {losses['lm loss'].item()!r}", flush=True)
        return (losses, *others)

    return stepped


if __name__ == "__main__":
    training.build_train_valid_test_data_loaders = with_printed_training_data(
        training.build_train_valid_test_data_loaders
    )
    training.train_step = with_printed_losses(training.train_step)
    runpy.run_path(str(SCRIPT), run_name="__main__")
