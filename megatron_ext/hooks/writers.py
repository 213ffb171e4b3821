"""Write the report of a resume to Megatron's TensorBoard and W&B writers, if they are on.

Only the last rank has the writers (``_set_tensorboard_writer``, training/global_vars.py:210,
0.19.2). It has the whole report too, because sums over the ranks are computed on all of them. No
communication is needed.
"""

from __future__ import annotations

import html
import importlib
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from ..base.text import printable
from ..host.contract import TRAINING
from ..report.scalars import PREFIX, scalars
from ..resume.session import Resume


def write_to_writers(resume: Resume, iteration: int) -> None:
    """Write the scalars, and the plan as text. If a writer fails, only the log says so.

    Args:
        resume: The complete resume.
        iteration: The iteration at which the run continues.
    """
    variables = importlib.import_module(f"{TRAINING}.global_vars")
    ways: tuple[tuple[str, Any, Callable[..., None]], ...] = (
        ("TensorBoard", variables.get_tensorboard_writer(), _to_tensorboard),
        ("W&B", variables.get_wandb_writer(), _to_wandb),
    )
    for name, writer, write in ways:
        if not writer or resume.report is None:
            continue
        try:
            numbers = scalars(resume.report.to_json())
            write(writer, numbers, _lines(resume), iteration)
        except Exception as e:  # the writer may raise anything: a full disk, a lost connection
            _say_here(
                f"megatron_ext: could not write everything to {name}: {type(e).__name__}: {e}"
            )
        else:
            _say_here(f"megatron_ext: {len(numbers)} scalars and the plan written to {name}")


def _lines(resume: Resume) -> list[str]:
    report = resume.report
    assert report is not None
    rank = dist.get_rank() if dist.is_initialized() else 0
    return [*map(printable, (*report.lines(rank), *report.scheduler_lines()))]


def _to_tensorboard(
    writer: Any, numbers: dict[str, float], lines: list[str], iteration: int
) -> None:
    for name, value in numbers.items():
        writer.add_scalar(name, value, iteration)
    # TensorBoard renders text as Markdown, which shows indented lines verbatim.
    writer.add_text(f"{PREFIX}/plan", "\n".join(f"    {line}" for line in lines), iteration)
    writer.flush()


def _to_wandb(writer: Any, numbers: dict[str, float], lines: list[str], iteration: int) -> None:
    # Megatron's W&B writer is the wandb module itself.
    text = writer.Html(f"<pre>{html.escape(chr(10).join(lines))}</pre>")
    writer.log({**numbers, f"{PREFIX}/plan": text}, iteration)


def _say_here(line: str) -> None:
    """Print a line on this rank, which is the last one."""
    print(printable(line), flush=True)
