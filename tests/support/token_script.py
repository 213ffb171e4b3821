"""The training script of the demo, with the token ids of every sample in its log.

With KILL_AT_MICRO_BATCH=N in the environment every rank kills itself as it draws the N-th.
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


if __name__ == "__main__":
    training.build_train_valid_test_data_loaders = with_printed_training_data(
        training.build_train_valid_test_data_loaders
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
