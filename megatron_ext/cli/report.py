"""``python -m megatron_ext report``: the HTML page of a resume report, made again from its JSON."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from ..errors import MegatronExtError
from . import output


def add_to(commands: Any) -> None:
    """Add the command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="make the HTML page of a resume report from its JSON",
        description="Make the HTML page of a resume report from its JSON, with plots where "
        "matplotlib and megatron-core can be imported. Exit status: 0, 2 where the file is no "
        "resume report or the page cannot be written.",
    )
    parser.add_argument("report", help="resume-report.json or transition-report-<iteration>.json")
    parser.add_argument("--html", required=True, metavar="FILE", help="the page to write")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make the page; see the description for the exit status."""
    return output.guarded(lambda: _report(options))


def _report(options: argparse.Namespace) -> int:
    from .. import report_page, report_plots
    from ..files import replace

    document = _read(Path(options.report))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, about what it does without a GPU
        plots = report_plots.draw(document)
    try:
        page = report_page.page(document, plots)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
        raise _no_report(options.report, f"{type(e).__name__}: {e}") from e
    replace(Path(options.html), page)
    for line in plots.absent:
        print(output.printable(line))
    print(output.printable(f"{options.html}: written from {options.report}"))
    return 0


def _read(file: Path) -> dict[str, Any]:
    from ..report import SCHEMA

    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
        raise _no_report(file, f"{type(e).__name__}: {e}") from e
    found = document.get("schema") if isinstance(document, dict) else type(document).__name__
    if found != SCHEMA:
        raise _no_report(file, f"its schema is {found!r}, expected {SCHEMA!r}")
    return document


def _no_report(file: str | Path, why: str) -> MegatronExtError:
    return MegatronExtError(
        f"{file} is no resume report of this version: {why}. Give the resume-report.json that "
        "--selective-report wrote"
    )
