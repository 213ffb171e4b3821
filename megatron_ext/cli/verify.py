"""``python -m megatron_ext verify``: read a whole checkpoint and check everything it stores."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from ..checkpoint.stored import StoredCheckpoint
    from ..offline.verified import Verification


def add_to(commands: Any) -> None:
    """Add the command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="read a whole checkpoint once: checksums, sizes, index, NaN, master weights",
        description="Read a whole checkpoint once, in parts, and check the files against the "
        "index, the CRC32 that torch.save has stored for every item, NaN and infinite values, "
        "negative second moments, and that the master weights are the model's weights. Exit "
        "status: 0; 1 if values cannot be used or master weights are not the model's; 2 if "
        "something is damaged or cannot be read.",
    )
    parser.add_argument(
        "checkpoint", help="the directory given to --load, or that of one iteration"
    )
    parser.add_argument("--iteration", type=int, help="iteration to verify; default: the last")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Verify the checkpoint; see the description for the exit status."""
    return output.guarded(lambda: _verify(options))


def _verify(options: argparse.Namespace) -> int:
    from ..checkpoint.stored import open_checkpoint
    from ..offline.documents import verify_document
    from ..offline.verification import total_bytes, verify

    stored = open_checkpoint(options.checkpoint, options.iteration)
    with output.progress_bar(total_bytes(stored), "verify") as progress:
        found = verify(stored, progress)
    if options.json:
        output.print_json(verify_document(found))
    else:
        _print(stored, found)
    return found.status


def _print(stored: StoredCheckpoint, found: Verification) -> None:
    to = output.console()
    columns = ("file", "item", "problem")
    rows = [dataclasses.astuple(damage) for damage in found.damages]
    output.print_table(to, "damaged: restore these files, or load another iteration", columns, rows)
    columns = ("tensor", "NaN, infinite, or negative in a second moment", "of")
    rows = [dataclasses.astuple(values) for values in found.values]
    output.print_table(to, "elements that training cannot use", columns, rows)
    output.print_proof(to, "", stored, found.master_weights)
    for note in found.notes:
        output.print_text(to, note)
    verdict = ("nothing wrong was found", "the bytes are whole, the values are not", "damaged")
    output.print_text(
        to,
        f"{found.directory}: {found.items} items of {found.files} files, {found.size} bytes "
        f"read: {verdict[found.status]}",
        style=("green", "yellow", "bold red")[found.status],
    )
