"""The demo's training script where matplotlib is not installed and TensorBoard takes no text."""

import runpy
import sys
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

import megatron_ext


def refuse(self, tag, *args, **kwargs):
    raise OSError(f"no space left for {tag}")


if __name__ == "__main__":
    sys.modules["matplotlib"] = None
    SummaryWriter.add_text = refuse
    script = Path(megatron_ext.__file__).parent / "demo" / "pretrain_gpt.py"
    runpy.run_path(str(script), run_name="__main__")
