"""The training script of the demo; prints param_groups and scheduler as a load has left them."""

import json
import runpy
from pathlib import Path

from megatron.training import training

import megatron_ext

SCRIPT = Path(megatron_ext.__file__).parent / "demo" / "pretrain_gpt.py"


def after_the_load(train):
    """Around Megatron's loop."""

    def run(forward_step_func, model, optimizer, opt_param_scheduler, *args, **kwargs):
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        found = {"groups": groups, "num_steps": opt_param_scheduler.num_steps}
        print("AFTER THE LOAD:", json.dumps(found, sort_keys=True, default=repr), flush=True)
        return train(forward_step_func, model, optimizer, opt_param_scheduler, *args, **kwargs)

    return run


if __name__ == "__main__":
    training.train = after_the_load(training.train)
    runpy.run_path(str(SCRIPT), run_name="__main__")
