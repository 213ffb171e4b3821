"""The training script of the demo with an optimizer that is changed after the load.

TAMPER in the environment says what: ``lr``, ``betas``, ``exp_avg`` (on the last rank) or
``exp_avg_sq``.
"""

import os
import runpy
from pathlib import Path

import torch
from megatron.training import training

import megatron_ext

SCRIPT = Path(megatron_ext.__file__).parent / "demo" / "pretrain_gpt.py"


def after_the_load(train):
    """Around Megatron's loop."""

    def run(forward_step_func, model, optimizer, *args, **kwargs):
        for member in optimizer.chained_optimizers:
            tamper(member.optimizer)
        return train(forward_step_func, model, optimizer, *args, **kwargs)

    return run


def tamper(inner):
    what = os.environ["TAMPER"]
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    if what == "lr":
        inner.param_groups[-1]["lr"] *= 10
    elif what == "betas":
        inner.param_groups[0]["betas"] = (0.5, 0.9)
    elif what == "exp_avg_sq" or last:
        for state in inner.state.values():
            state[what].mul_(0.0 if what == "exp_avg_sq" else 1e4)


if __name__ == "__main__":
    training.train = after_the_load(training.train)
    runpy.run_path(str(SCRIPT), run_name="__main__")
