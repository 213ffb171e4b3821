"""What the commands share: tables of untrusted text, JSON, progress and errors."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..base.text import printable as printable
from ..errors import MegatronExtError, PolicyError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..checkpoint.bucket_layout import BucketLayout

#: Columns where stdout is no terminal: a line in a log is not to be broken.
_WIDE = 200


def require_package(name: str, purpose: str) -> None:
    """Import a package that only some commands need.

    Args:
        name: Of the package, as it is imported and, but for letter case, installed.
        purpose: What needs it.

    Raises:
        MegatronExtError: It cannot be imported.
    """
    try:
        importlib.import_module(name)
    except ImportError as e:
        raise MegatronExtError(
            f"{purpose} needs the package {name}, which cannot be imported: {e}. Install it with "
            "pip install 'megatron_ext[report]'"
        ) from e


def guarded(command: Callable[[], int]) -> int:
    """Run a command; an error that a user can meet is one message and the exit status 2.

    Args:
        command: Gives the exit status.
    """
    try:
        return command()
    except (MegatronExtError, OSError) as e:
        print("error:", printable(str(e), keep="\n"), file=sys.stderr)
        return 2


def print_json(document: Any) -> None:
    """One document on stdout.

    Args:
        document: Of what `megatron_ext.base.values.plain` gives.
    """
    print(json.dumps(document, indent=2, allow_nan=False))


def console() -> Console:
    """For stdout; without markup, since names of a checkpoint could be taken for it."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() else _WIDE
    return Console(width=wide, markup=False, highlight=False, emoji=False)


def print_table(
    to: Console, title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]
) -> None:
    """A table, or nothing where there are no rows.

    Args:
        to: What `console` gave.
        title: Above it.
        columns: Their names.
        rows: Any values.
    """
    from rich.table import Table

    table = Table(title=cell(title), title_justify="left")
    for name in columns:
        table.add_column(cell(name), overflow="fold")
    for row in rows:
        table.add_row(*map(cell, row))
    if table.row_count:
        to.print(table)


def cell(value: Any) -> Text:
    """Text as it is: no markup, and no control characters for the terminal to obey.

    Args:
        value: Anything.
    """
    from rich.text import Text

    if isinstance(value, float):
        value = f"{value:.6g}"
    return Text(printable("" if value is None else str(value)))


@contextmanager
def progress_bar(total: int, what: str) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr where that is a terminal.

    Args:
        total: Bytes.
        what: Is read.

    Yields:
        What is to be told how many bytes were read; None where there is no bar.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def add_layout_to(parser: argparse.ArgumentParser) -> None:
    """Add ``--layout``, which goes with ``--moments``.

    Args:
        parser: Of a command.
    """
    parser.add_argument(
        "--layout",
        metavar="FILE",
        help="with --moments, of dp_reshardable checkpoints: the parameter-layout.json of a run "
        "with --selective-dry-run --selective-report, for a line for each parameter in place of "
        "each bucket",
    )


def read_layout(options: argparse.Namespace) -> BucketLayout | None:
    """What ``--layout`` names; None where it is not given.

    Args:
        options: With ``layout`` and ``moments``.

    Raises:
        PolicyError: Moments are not asked for.
        CheckpointError: The file is none.
    """
    if options.layout is None:
        return None
    if not options.moments:
        raise PolicyError("--layout without --moments: it says where moments are. Add --moments")
    from ..checkpoint.bucket_layout import BucketLayout

    return BucketLayout.read(options.layout)
