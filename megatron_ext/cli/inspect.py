"""``python -m megatron_ext inspect``: print the content of a checkpoint."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from rich.console import Console

    from ..offline.inspection import Inspection
    from ..offline.moment_scan import TensorStatistics


def add_to(commands: Any) -> None:
    """Add the command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="print the content of a checkpoint: groups, step, scheduler, layout, moments",
        description="Print the content of a checkpoint. No pickle is run, and no tensor is read "
        "without --moments. Exit status: 0; 1 if --moments finds NaN or infinite values, or master "
        "weights that are not the model's weights; 2 if the checkpoint cannot be read.",
    )
    parser.add_argument(
        "checkpoint", help="the directory given to --load, or that of one iteration"
    )
    parser.add_argument("--iteration", type=int, help="iteration to inspect; default: the last")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--moments",
        action="store_true",
        help="also read the moments and the master weights (torch_dist) and print norm, "
        "largest absolute value and number of non-finite elements of each; compare the master "
        "weights with the model's weights, where both have names",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Inspect the checkpoint; see the description for the exit status."""
    return output.guarded(lambda: _inspect(options))


def _inspect(options: argparse.Namespace) -> int:
    from ..checkpoint.stored import open_checkpoint
    from ..offline.documents import inspect_document
    from ..offline.inspection import inspect_checkpoint
    from ..offline.master_proof import bytes_of, prove
    from ..offline.moment_scan import scan
    from ..offline.slabs import total_bytes

    stored = open_checkpoint(options.checkpoint, options.iteration)
    found = inspect_checkpoint(stored)
    statistics, proof = None, None
    if options.moments:
        total = total_bytes(stored) + bytes_of(stored)
        with output.progress_bar(total, "moments") as progress:
            statistics = scan(stored, progress)
            proof = prove(stored, progress)
    if options.json:
        output.print_json(inspect_document(found, statistics, proof))
    else:
        to = output.console()
        _print(to, found, statistics)
        if proof is not None:
            output.print_proof(to, "", stored, proof)
    return int(any(s.nonfinite for s in statistics or ()) or bool(proof and proof.differences))


def _print(to: Console, found: Inspection, statistics: Iterable[TensorStatistics] | None) -> None:
    output.print_table(to, "checkpoint", ("", ""), _summary(found))
    for number, optimizer in enumerate(found.optimizers):
        keys = dict.fromkeys(k for g in optimizer.groups for k in g)
        columns = ["param_groups", *map(str, range(len(optimizer.groups)))]
        rows = [[k, *(str(g[k]) if k in g else "-" for g in optimizer.groups)] for k in keys]
        title = f"optimizer {number}: step {optimizer.step}"
        output.print_table(to, title, columns, rows)
        if optimizer.mark is not None:
            to.print(output.cell(f"{optimizer.mark.describe()} (offset {optimizer.mark.offset})"))
        output.print_table(to, "grad_scaler", ("", ""), (optimizer.grad_scaler or {}).items())
    output.print_table(to, "scheduler", ("", ""), (found.scheduler or {}).items())
    columns = ["optimizer", "state", "dtype", "by", "tensors", "chunks", "elements", "bytes"]
    rows = [list(dataclasses.astuple(m)) for m in found.moments]
    output.print_table(to, "moments", columns, rows)
    columns = ["optimizer", "state", "name", "elements", "norm", "largest", "non-finite"]
    rows = [list(dataclasses.astuple(s)) for s in statistics or ()]
    output.print_table(to, "statistics of the moments", columns, rows)
    for note in found.notes:
        to.print(output.cell(note))


def _summary(found: Inspection) -> Iterable[tuple[str, Any]]:
    yield "directory", found.directory
    yield "format", found.format
    yield "iteration", "release" if found.release else found.iteration
    yield "megatron-core", found.megatron_core or f"not recorded ({found.written_by})"
    sizes = " ".join(f"{k}={v}" for k, v in found.layout.items())
    yield "parallel sizes", sizes or "not recorded"
    yield "sharding type", found.sharding_type or "none"
    yield "scheduler num_steps", "none" if found.num_steps is None else found.num_steps
    yield from found.counters.items()
    yield "saved arguments", len(found.args)
