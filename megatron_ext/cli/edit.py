"""``python -m megatron_ext edit``: copy a checkpoint with other hyperparameters."""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from ..offline.edit import Edited
    from ..offline.edit_settings import EditedValue
    from ..offline.fitting_flags import FittingFlags


def add_to(commands: Any) -> None:
    """Add the command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "edit",
        help="write a copy of a checkpoint with other hyperparameters, for stock Megatron",
        description="Write a copy of a checkpoint whose param_groups and scheduler have other "
        "values, so that Megatron without this package can resume from it with other arguments. "
        "What does not change is copied, as a reflink where the file system has them.",
    )
    parser.add_argument("source", help="the directory given to --save; it is not changed")
    parser.add_argument("--out", required=True, help="a new directory, for --load")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        required=True,
        metavar="KEY=VALUE",
        help="new value of a key of the param_groups or of the scheduler, such as max_lr=1e-4 or "
        "betas=0.9,0.95",
    )
    parser.add_argument(
        "--group",
        nargs="+",
        action="extend",
        default=[],
        metavar="ATTR=VALUE",
        help="edit only the param_groups with all these attributes, such as "
        "is_expert_parallel=true",
    )
    parser.add_argument("--iteration", type=int, help="iteration to edit; default: the last")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="run the code in the checkpoint's pickles; only for a checkpoint that you trust",
    )
    parser.add_argument(
        "--hard-links",
        action="store_true",
        help="make hard links instead of copies. Megatron writes into files that exist: a save of "
        "the same iteration into one directory then destroys the other",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Edit a copy of the checkpoint; the exit status is 2 if that is not possible."""
    return output.guarded(lambda: _edit(options))


def _edit(options: argparse.Namespace) -> int:
    from ..base.values import as_json
    from ..offline.edit import edit
    from ..offline.edit_settings import parse_settings

    done = edit(
        options.source,
        options.out,
        parse_settings(options.set),
        parse_settings(options.group, "--group"),  # type: ignore[arg-type]
        options.iteration,
        options.allow_pickle,
        hard_links=options.hard_links,
        progress_bar=output.progress_bar,
    )
    if options.json:
        output.print_json(as_json(_document(done)))
    else:
        to = output.console()
        for line in _lines(done):
            output.print_text(to, line, 4)
    return 0


def _document(done: Edited) -> dict[str, Any]:
    changes = [
        {**dataclasses.asdict(c), "in": "scheduler" if c.in_scheduler else "group"}
        for c in done.changes
    ]
    return {
        **dataclasses.asdict(done),
        "directory": str(done.directory),
        "changes": changes,
        **dataclasses.asdict(done.flags),
    }


def _lines(done: Edited) -> list[str]:
    """List the changes in groups and scheduler, each distinct change once."""

    def describe(change: EditedValue) -> tuple[bool, str]:
        return change.in_scheduler, f"{change.key} {change.old!r} -> {change.new!r}"

    lines = [f"{done.directory}: iteration {done.iteration}"]
    for (in_scheduler, text), count in Counter(map(describe, done.changes)).items():
        lines.append(f"  scheduler: {text}" if in_scheduler else f"  groups: {text} ({count})")
    if not any(c.in_scheduler for c in done.changes):
        lines.append("  scheduler: nothing changed")
    ways = {"copied": done.copied, "cloned": done.cloned, "linked": done.linked}
    files = ", ".join(
        f"{n} {way}" for way, n in (*ways.items(), ("written", len(done.written))) if n
    )
    return [*lines, f"  files: {files}", *_flag_lines(done.flags)]


def _flag_lines(found: FittingFlags) -> Iterator[str]:
    from ..offline.fitting_flags import OVERRIDE

    if not found.flags:
        return
    yield f"flags for stock Megatron: {' '.join(found.flags)}"
    if found.several:
        yield (
            f"  the copy's param_groups differ in {' and '.join(found.several)}, for which stock "
            "has one flag: only a script that builds such param_groups can load it"
        )
    if found.inexpressible:
        yield (
            f"  no flag gives the copy's {', '.join(found.inexpressible)}; with {OVERRIDE} the "
            "scheduler has the arguments' values"
        )
    else:
        yield (
            "  stock asserts that the scheduler's values are these. For another --train-iters set "
            f"wd_incr_steps (in samples) too, or add {OVERRIDE}"
        )
