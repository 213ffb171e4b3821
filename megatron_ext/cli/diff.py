"""``python -m megatron_ext diff``: compare two checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoint.stored import StoredCheckpoint
    from ..offline.comparison import Difference
    from ..offline.master_proof import MasterProof
    from ..offline.moment_scan import TensorDistance


def add_to(commands: Any) -> None:
    """Add the command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "diff",
        help="compare two checkpoints: groups, step, scheduler, arguments, layout, moments",
        description="Compare two checkpoints. Groups are paired as in a resume. Exit status: 0 if "
        "nothing differs, 1 if something does or with --moments if master weights are not the "
        "model's weights, 2 if a checkpoint cannot be read.",
    )
    parser.add_argument("a", help="the directory given to --load, or that of one iteration")
    parser.add_argument("b", help="the other checkpoint")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--moments",
        action="store_true",
        help="also read the moments and the master weights (torch_dist) and print the "
        "distance between tensors of the same key and shape; compare each checkpoint's master "
        "weights with its model's weights",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compare the checkpoints; see the description for the exit status."""
    return output.guarded(lambda: _diff(options))


def _diff(options: argparse.Namespace) -> int:
    from ..checkpoint.stored import open_checkpoint
    from ..offline.comparison import compare
    from ..offline.documents import diff_document
    from ..offline.inspection import inspect_checkpoint

    a, b = open_checkpoint(options.a), open_checkpoint(options.b)
    changes = compare(inspect_checkpoint(a), inspect_checkpoint(b))
    distances = _distances(a, b) if options.moments else None
    proofs = _proofs(a, b) if options.moments else None
    if options.json:
        output.print_json(diff_document(a, b, changes, distances, proofs))
    else:
        to = output.console()
        _print(to, a, b, changes, distances)
        for side, stored, proof in zip(("a: ", "b: "), (a, b), proofs or (), strict=False):
            output.print_proof(to, side, stored, proof)
    wrong = any(proof.differences for proof in proofs or ())
    return int(wrong or bool(changes) or any(d.different for d in distances or ()))


def _distances(a: StoredCheckpoint, b: StoredCheckpoint) -> list[TensorDistance]:
    from ..offline.moment_scan import distances
    from ..offline.slabs import common_keys, total_bytes

    total = total_bytes(a, common_keys(a, b))
    with output.progress_bar(total, "moments") as progress:
        return distances(a, b, progress)


def _proofs(a: StoredCheckpoint, b: StoredCheckpoint) -> tuple[MasterProof, MasterProof]:
    from ..offline.master_proof import bytes_of, prove

    with output.progress_bar(bytes_of(a) + bytes_of(b), "master weights") as progress:
        return prove(a, progress), prove(b, progress)


def _print(
    to: Console,
    a: StoredCheckpoint,
    b: StoredCheckpoint,
    changes: Sequence[Difference],
    distances: Sequence[TensorDistance] | None,
) -> None:
    to.print(output.cell(f"a: {a.directory}"))
    to.print(output.cell(f"b: {b.directory}"))
    rows = [(c.section, c.name, _side(c, "a"), _side(c, "b")) for c in changes]
    output.print_table(to, "differences", ("", "", "a", "b"), rows)
    if not changes:
        to.print("no differences" if distances is None else "no differences besides the moments")
    if distances is not None:
        columns = ["optimizer", "state", "name", "elements", "distance", "relative", "different"]
        rows_of_moments = [dataclasses.astuple(d) for d in distances]
        output.print_table(to, "distance of the moments", columns, rows_of_moments)
        if not distances:
            to.print("no moments have the same key and shape")


def _side(change: Difference, side: str) -> str:
    if change.only not in (None, side):
        return "-"
    return str(getattr(change, side))
