"""A training script of one's own: one more argument than Megatron's, no launcher needed for it."""

import inspect
import runpy
from pathlib import Path

from megatron.training import arguments

import megatron_ext

if __name__ == "__main__":
    # Stands for `parse_and_validate_args(extra_args_provider=megatron_ext.add_arguments)`.
    original = arguments.parse_and_validate_args
    assert "extra_args_provider" in inspect.signature(original).parameters
    arguments.parse_and_validate_args = lambda: original(
        extra_args_provider=megatron_ext.add_arguments
    )
    script = Path(megatron_ext.__file__).parent / "demo" / "pretrain_gpt.py"
    runpy.run_path(str(script), run_name="__main__")
