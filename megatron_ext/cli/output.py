"""Output shared by the commands: tables of untrusted text, JSON, progress and errors.

Environment:
    NO_COLOR: If it is set, a terminal gets no colours and no bold text either.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import textwrap
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
#: Smallest width of a column that is shortened, and the spaces between two columns.
_NARROWEST, _GAP = 9, "  "
_POWERS = ("", "k", "M", "G", "T", "P")


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
    except ModuleNotFoundError as e:  # after pip install --no-deps
        message = f"the module {e.name} is not installed. Install the package that has it"
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
    """Make a console for stdout, without markup: names in a checkpoint could look like markup.

    It prints escape codes only on a terminal, and none if NO_COLOR is set.
    """
    from rich.console import Console

    terminal = sys.stdout.isatty()
    return Console(
        width=None if terminal else _WIDE,
        color_system="auto" if terminal and not os.environ.get("NO_COLOR") else None,
        force_terminal=terminal,
        markup=False,
        highlight=False,
        emoji=False,
    )


def print_table(
    to: Console, title: str, columns: Iterable[str], rows: Iterable[Iterable[Any]]
) -> None:
    """Print a table that fits the width, or nothing if there are no rows.

    Text is folded between words. A name that is too long is shortened in the middle.

    Args:
        to: A console from `console`.
        title: Title above the table, or nothing.
        columns: Names of the columns.
        rows: Rows of any values; numbers are aligned on the right.
    """
    body = [[*row] for row in rows]
    if not body:
        return
    cells = [[printable(as_text(value)) for value in row] for row in [[*columns], *body]]
    widths = _fitted([max(map(len, column)) for column in zip(*cells, strict=True)], to.width)
    right = [
        all(isinstance(v, int | float) or v is None for v in column)
        for column in zip(*body, strict=True)
    ]
    if title:
        to.print(styled(title, "bold"), soft_wrap=True)
    for number, row in enumerate(cells):
        if number or any(row):
            for line in _lines_of(row, widths, right):
                to.print(styled(line, "" if number else "dim"), soft_wrap=True)
    to.print()


def _fitted(widths: list[int], width: int) -> list[int]:
    """Take columns from the widest until all fit."""
    room = width - 2 - len(_GAP) * (len(widths) - 1)
    while sum(widths) > room and max(widths) > _NARROWEST:
        widths[widths.index(max(widths))] -= 1
    return widths


def _lines_of(row: list[str], widths: list[int], right: list[bool]) -> Iterator[str]:
    folded = [_folded(text, width) for text, width in zip(row, widths, strict=True)]
    for parts in itertools.zip_longest(*folded, fillvalue=""):
        aligned = [
            part.rjust(width) if end else part.ljust(width)
            for part, width, end in zip(parts, widths, right, strict=True)
        ]
        yield f"  {_GAP.join(aligned)}".rstrip()


def _folded(text: str, width: int) -> list[str]:
    words = " ".join(shortened(word, width) for word in text.split(" "))
    return textwrap.wrap(words, width, break_on_hyphens=False) or [""]


def shortened(name: str, width: int) -> str:
    """Leave out the middle of a name that is longer than the width.

    Args:
        name: A word.
        width: At least 3.
    """
    if len(name) <= width:
        return name
    head = (width - 1) // 2
    return f"{name[:head]}\u2026{name[len(name) - (width - 1 - head) :]}"


def print_text(to: Console, text: str, indent: int = 0, style: str = "") -> None:
    """Print a text. On a terminal it is folded between words, but a path or a flag never is.

    Args:
        to: A console from `console`.
        text: Any text.
        indent: Spaces before every line but the first.
        style: Style of a terminal.
    """
    lines = [printable(text)]
    if to.is_terminal:
        lines = textwrap.wrap(
            lines[0],
            to.width,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    for line in lines:
        to.print(styled(line, style), soft_wrap=True)


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
        print_text(to, f"{side}{line}")
    columns = ("tensor", "elements that differ", "of", "largest difference")
    rows = [(d.name, d.elements, d.of, d.largest) for d in proof.differences]
    print_table(to, f"{side}master weights that are not the model's weights", columns, rows)


def as_text(value: Any) -> str:
    """Write a value of a table: a number with four digits, nothing for None.

    Args:
        value: Anything.
    """
    if isinstance(value, list | tuple):
        return f"({', '.join(map(as_text, value))})"
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def as_texts(old: Any, new: Any) -> tuple[str, str]:
    """Write two values that differ, with as many digits as that takes.

    Args:
        old: Anything.
        new: Anything else.
    """
    texts = as_text(old) or "none", as_text(new) or "none"
    return texts if texts[0] != texts[1] else (str(old), str(new))


def large(count: int, unit: str = "") -> str:
    """Write a count with four digits, as in 328.7k or 1.315 MB.

    Args:
        count: At least 0.
        unit: The unit.
    """
    if count >= 10 ** (3 * len(_POWERS)):  # no count that a file can hold
        return str(count)
    size, power = float(count), 0
    while size >= 999.95 and power < len(_POWERS) - 1:
        size, power = size / 1000, power + 1
    space = " " if unit else ""
    return f"{size:.4g}{space}{_POWERS[power]}{unit}"


def styled(text: str, style: str = "") -> Text:
    """Make text without markup and without control characters.

    Args:
        text: Any text.
        style: Style of a terminal.
    """
    from rich.text import Text

    return Text(printable(text), style=style)


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
