"""``python -m megatron_ext inspect``: print the content of a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from . import moment_tables, output

if TYPE_CHECKING:
    from rich.console import Console

    from ..offline.inspection import Inspection


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
        help="also read the moments and the master weights (torch_dist) and print RMS, "
        "largest absolute value and number of non-finite elements; compare the master "
        "weights with the model's weights, where both have names",
    )
    moment_tables.add_options(parser, sorted_by=True)
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
    moment_tables.check_options(options, stored)
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
        _print(to, found)
        if statistics is not None:
            moment_tables.print_statistics(to, statistics, options)
        if proof is not None:
            output.print_proof(to, "", stored, proof)
    return int(any(s.nonfinite for s in statistics or ()) or bool(proof and proof.differences))


def _print(to: Console, found: Inspection) -> None:
    output.print_table(to, str(found.directory), ("", ""), _summary(found))
    for number, optimizer in enumerate(found.optimizers):
        _print_groups(to, f"optimizer {number}: step {optimizer.step}", optimizer.groups)
        if optimizer.mark is not None:
            mark = optimizer.mark
            output.print_text(to, f"  {mark.describe()} (offset {mark.offset})", 2)
        if optimizer.grad_scaler:
            output.print_text(to, f"  grad_scaler: {_listed(optimizer.grad_scaler)}", 4)
    columns = ["state", "dtype", "by", "tensors", "chunks", "elements", "size"]
    several = any(m.optimizer is not None for m in found.moments)
    rows = [
        (
            *([m.optimizer] if several else []),
            *(m.state, m.dtype, m.by, m.tensors, m.chunks),
            *(output.large(m.elements), output.large(m.size, "B")),
        )
        for m in found.moments
    ]
    output.print_table(to, "moments", ["optimizer"] * several + columns, rows)
    for note in found.notes:
        output.print_text(to, note, 2)


def _print_groups(to: Console, title: str, groups: tuple[Mapping[str, Any], ...]) -> None:
    """Print the values that all param_groups have in common, then the others, one line a group."""
    texts = [{key: output.as_text(value) or "None" for key, value in g.items()} for g in groups]
    keys = dict.fromkeys(key for g in texts for key in g)
    shared = {k: texts[0][k] for k in keys if len({g.get(k) for g in texts}) == 1}
    count = "1 param_group" if len(groups) == 1 else f"{len(groups)} param_groups, all with"
    output.print_text(to, title, style="bold")
    output.print_text(to, f"  {count}: {_listed(shared)}", 4)
    others = [k for k in keys if k not in shared]
    if others:
        rows = [[str(n), *(g.get(k, "-") for k in others)] for n, g in enumerate(texts)]
        output.print_table(to, "", ["group", *others], rows)
    else:
        to.print()


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {output.as_text(v) or None}" for k, v in values.items()) or "none"


def _summary(found: Inspection) -> Iterable[tuple[str, Any]]:
    yield "iteration", "release" if found.release else found.iteration
    yield "format", " ".join(filter(None, (found.format, found.sharding_type)))
    yield "megatron-core", found.megatron_core or f"not recorded ({found.written_by})"
    sizes = " ".join(f"{k}={v}" for k, v in found.layout.items())
    yield "parallel sizes", sizes or "not recorded"
    if found.counters:
        yield "counters", _listed(found.counters)
    yield "scheduler", _listed(found.scheduler or {})
    yield "saved arguments", len(found.args)
