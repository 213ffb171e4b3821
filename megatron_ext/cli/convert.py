"""``python -m megatron_ext convert``: copy a checkpoint to a form that Megatron reads anywhere."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from ..base.text import first_of
from . import output


def add_to(commands: Any) -> None:
    """Add the command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="write a fully_reshardable copy of a checkpoint",
        description="Write a fully_reshardable copy of a torch_dist checkpoint of megatron-core "
        "0.15 or earlier whose optimizer state is fully_sharded_model_space, which newer "
        "megatron-core cannot read. With --to fully_reshardable also of one whose optimizer state "
        "is dp_reshardable, or which stock Megatron 0.16 to 0.19 has stored shifted as "
        "fully_reshardable because several buckets are padded: the model's weights prove what "
        "belongs where.",
    )
    parser.add_argument("source", help="the directory given to --save; it is not changed")
    parser.add_argument("target", help="a new directory, for --load")
    parser.add_argument("--iteration", type=int, help="iteration to convert; default: the last")
    parser.add_argument(
        "--to",
        choices=["fully_reshardable"],
        help="also convert dp_reshardable, which Megatron loads with the same tensor, pipeline and "
        "expert parallel sizes only, and put back fully_reshardable state that was stored shifted",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Convert the checkpoint; the exit status is 2 if that is not possible."""
    return output.guarded(lambda: _convert(options))


def _convert(options: argparse.Namespace) -> int:
    from ..offline.convert import convert

    done = convert(options.source, options.target, options.iteration, options.to)
    if options.json:
        output.print_json({**dataclasses.asdict(done), "directory": str(done.directory)})
        return 0
    if done.differing:
        print(
            "warning: the ranks that wrote the checkpoint held different copies; the first rank's "
            f"was taken, as Megatron's own save does: {first_of(done.differing)}",
            file=sys.stderr,
        )
    for name, elements in done.lost:
        print(
            f"warning: {elements} elements of {name} were overwritten when it was saved: their "
            "moments are 0, their master weights the model's weights",
            file=sys.stderr,
        )
    if done.reset:
        print(
            "warning: it is not certain where these parameters are stored: their moments are 0, "
            f"their master weights the model's weights: {', '.join(done.reset)}",
            file=sys.stderr,
        )
    output.print_text(
        output.console(),
        f"{done.directory}: reassembled {done.reshaped} optimizer tensors, copied {done.copied} "
        f"tensors and objects, wrote {done.size} bytes",
    )
    return 0
