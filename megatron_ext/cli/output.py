"""Output shared by the commands: tables of untrusted text, JSON, progress and errors."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from ..base.text import printable as printable
from ..errors import MegatronExtError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..checkpoint.stored import StoredCheckpoint
    from ..offline.master_proof import MasterProof

#: Width in columns if stdout is not a terminal, so that lines in a log are not broken.
_WIDE = 200


def require_package(name: str, purpose: str) -> None:
    """Import a package that only some commands need.

    Args:
        name: Import name of the package; its distribution has the same name except for case.
        purpose: The feature that needs it, for the message.

    Raises:
        MegatronExtError: The package cannot be imported.
    """
    try:
        importlib.import_module(name)
    except ImportError as e:
        raise MegatronExtError(
            f"{purpose} needs the package {name}, which cannot be imported: {e}. Install it with "
            "pip install 'megatron_ext[report]'"
        ) from e


def guarded(command: Callable[[], int]) -> int:
    """Run a command; an error becomes one message and the exit status 2.

    Exit status 1, which Python gives to a traceback, is an answer of some commands. An error that
    nobody has foreseen is raised in Python's development mode (``python -X dev``).

    Args:
        command: Returns the exit status.
    """
    try:
        return command()
    except (MegatronExtError, OSError) as e:
        message = str(e)
    except Exception as e:  # damaged and hostile files raise anything
        if sys.flags.dev_mode:
            raise
        message = (
            f"unexpected {type(e).__name__}: {e}. A file is damaged, or this is a fault of "
            "megatron_ext: please report it with the output of the same command under python -X dev"
        )
    print("error:", printable(message, keep="\n"), file=sys.stderr)
    return 2


@contextmanager
def logs_to_stderr() -> Iterator[None]:
    """Send what Megatron prints and logs to stderr: stdout is for the command's own output.

    Megatron's import and its optimizers log, and may print, before a document is complete.
    """
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        yield


def print_json(document: Any) -> None:
    """Print one document on stdout.

    Args:
        document: Plain data, as from `megatron_ext.base.values.as_json`.
    """
    print(json.dumps(document, indent=2, allow_nan=False))


def console() -> Console:
    """Make a console for stdout, without markup: names in a checkpoint could look like markup."""
    from rich.console import Console

    wide = None if sys.stdout.isatty() else _WIDE
    return Console(width=wide, markup=False, highlight=False, emoji=False)


def print_table(
    to: Console, title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]
) -> None:
    """Print a table, or nothing if there are no rows.

    Args:
        to: A console from `console`.
        title: Title above the table.
        columns: Names of the columns.
        rows: Rows of any values.
    """
    from rich.table import Table

    table = Table(title=cell(title), title_justify="left")
    for name in columns:
        table.add_column(cell(name), overflow="fold")
    for row in rows:
        table.add_row(*map(cell, row))
    if table.row_count:
        to.print(table)


def print_proof(to: Console, side: str, stored: StoredCheckpoint, proof: MasterProof) -> None:
    """Print whether a checkpoint's master weights are its model's weights.

    Args:
        to: The console.
        side: Text before each line.
        stored: The checkpoint.
        proof: The comparison.
    """
    from ..offline.master_proof import explain

    for line in explain(stored, proof):
        to.print(cell(f"{side}{line}"))
    columns = ("tensor", "elements that differ", "of", "largest difference")
    rows = [(d.name, d.elements, d.of, d.largest) for d in proof.differences]
    print_table(to, f"{side}master weights that are not the model's weights", columns, rows)


def cell(value: Any) -> Text:
    """Make text without markup and without control characters.

    Args:
        value: Anything.
    """
    from rich.text import Text

    if isinstance(value, float):
        value = f"{value:.6g}"
    return Text(printable("" if value is None else str(value)))


@contextmanager
def progress_bar(total: int, what: str) -> Iterator[Callable[[int], None] | None]:
    """Show a progress bar on stderr, if that is a terminal.

    Args:
        total: Number of bytes to read.
        what: Label of the bar.

    Yields:
        A function to call with the number of bytes just read; None without a bar.
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
