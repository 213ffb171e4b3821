"""``python -m megatron_ext diff``: compare two checkpoints."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from . import moment_tables, output

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
    moment_tables.add_options(parser, sorted_by=False)
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
    moment_tables.check_options(options, a, b)
    changes = compare(inspect_checkpoint(a), inspect_checkpoint(b))
    distances = _distances(a, b) if options.moments else None
    proofs = _proofs(a, b) if options.moments else None
    if options.json:
        output.print_json(diff_document(a, b, changes, distances, proofs))
    else:
        to = output.console()
        _print(to, a, b, changes)
        if distances is not None:
            moment_tables.print_distances(to, distances, options)
            if not distances:
                output.print_text(to, "no moments have the same key and shape")
        elif not changes:
            output.print_text(to, "no differences")
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
    to: Console, a: StoredCheckpoint, b: StoredCheckpoint, changes: Sequence[Difference]
) -> None:
    output.print_text(to, f"a: {a.directory}", 3)
    output.print_text(to, f"b: {b.directory}", 3)
    for section in dict.fromkeys(c.section for c in changes):
        of_one = [c for c in changes if c.section == section]
        both = [c for c in of_one if c.only is None]
        # The largest relative change first, then what has none.
        both.sort(key=lambda c: -abs(_relative(c) or 0.0))
        rows = [(c.name, *output.as_texts(c.a, c.b), _percent(_relative(c))) for c in both]
        output.print_table(to, section, ("", "a", "b", "change"), rows)
        for side in "ab":
            names = [_alone(c) for c in of_one if c.only == side]
            if names:
                output.print_text(to, f"{section}, only in {side}: {', '.join(names)}", 2)
                to.print()


def _relative(change: Difference) -> float | None:
    """Compute (b - a) / |a| of two numbers; None for others."""
    a, b = change.a, change.b
    if not all(type(v) in (int, float) for v in (a, b)):
        return None
    try:
        found = (b - a) / abs(a) if a else math.copysign(math.inf, b)
    except OverflowError:
        return None
    return None if math.isnan(found) else found


def _percent(relative: float | None) -> str:
    if relative is None:
        return ""
    return "from 0" if math.isinf(relative) else f"{100 * relative:+.4g}%"


def _alone(change: Difference) -> str:
    value = change.a if change.only == "a" else change.b
    return change.name if change.section == "args" else f"{change.name} ({output.as_text(value)})"
