"""Megatron's own loop in a host that has its own entry: `enable`, then `pretrain`, as in Primus.

Primus calls ``megatron.training.pretrain`` itself (primus/backends/megatron/
megatron_pretrain_trainer.py:135), and its users' arguments are not parsed by Megatron.
"""

import os
import runpy
from pathlib import Path

import megatron_ext

if __name__ == "__main__":
    megatron_ext.enable(os.environ["MEGATRON_EXT_POLICY"])
    script = Path(megatron_ext.__file__).parent / "demo" / "pretrain_gpt.py"
    runpy.run_path(str(script), run_name="__main__")
