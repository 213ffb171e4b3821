"""A training script that builds this package's class itself, without its wrappers."""

import runpy
from pathlib import Path

from megatron.core import optimizer

import megatron_ext

if __name__ == "__main__":
    optimizer.DistributedOptimizer = megatron_ext.SelectiveAdam
    script = Path(megatron_ext.__file__).parent / "demo" / "pretrain_gpt.py"
    runpy.run_path(str(script), run_name="__main__")
