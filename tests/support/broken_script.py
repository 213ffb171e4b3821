"""The demo's training script without what makes a page; its TensorBoard refuses our text."""

import runpy
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

import megatron_ext
from tests.support.refused import refuse_page_packages

add_text = SummaryWriter.add_text


def refuse(self, tag, *args, **kwargs):
    if tag.startswith("megatron_ext"):
        raise OSError(f"no space left for {tag}")
    add_text(self, tag, *args, **kwargs)


if __name__ == "__main__":
    refuse_page_packages()
    SummaryWriter.add_text = refuse
    script = Path(megatron_ext.__file__).parent / "demo" / "pretrain_gpt.py"
    runpy.run_path(str(script), run_name="__main__")
