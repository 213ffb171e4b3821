"""The training script of the demo, with the token ids of every batch in its log."""

import runpy
from pathlib import Path

import torch
from megatron.training import get_args, training

import megatron_ext

SCRIPT = Path(megatron_ext.__file__).parent / "demo" / "pretrain_gpt.py"


def logged(loaders):
    """Around Megatron's loaders: each training micro-batch is printed as it is drawn."""

    def build(*args, **kwargs):
        train, *others = loaders(*args, **kwargs)
        return (None if train is None else _Printed(train), *others)

    return build


class _Printed:
    """A data loader that prints what it gives."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        for batch in self.loader:
            rank = torch.distributed.get_rank()
            for row in batch["tokens"].tolist():
                print(f"TOKENS rank {rank} args {get_args().iteration}: {row}", flush=True)
            yield batch


if __name__ == "__main__":
    training.build_train_valid_test_data_loaders = logged(
        training.build_train_valid_test_data_loaders
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
