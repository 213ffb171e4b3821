"""``python -m megatron_ext report``: make HTML pages from the resume reports of a run."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

from ..base import text
from ..base.files import open_regular, replace
from ..errors import MegatronExtError
from ..report.page import html_page
from ..report.plots import draw
from . import output

#: Bytes of the largest report.
_LARGEST = 1 << 26


def add_to(commands: Any) -> None:
    """Add the command to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="make HTML pages from the resume reports in a directory",
        description="Make resume-report.html from the resume-report.json in a directory, and a "
        "page from each transition-report-<iteration>.json. It needs matplotlib and Jinja2: pip "
        "install 'megatron_ext[report]'. Exit status: 0; 2 if there is no report or a page "
        "cannot be written.",
    )
    parser.add_argument("directory", metavar="DIR", help="the directory of --selective-report")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make the pages; see the description for the exit status."""
    return output.guarded(lambda: _report(Path(options.directory)))


def _report(directory: Path) -> int:
    for package in ("jinja2", "matplotlib"):
        output.require_package(package, "the page of a resume report")
    for source in _reports_in(directory):
        _make_page(source)
    return 0


def _reports_in(directory: Path) -> list[Path]:
    """List the JSON reports in a directory, the latest resume first."""
    from ..report.files import NAME, TRANSITION_NAME

    latest = directory / f"{NAME}.json"
    transitions = sorted(directory.glob(f"{TRANSITION_NAME.format(iteration='*')}.json"))
    found = [*([latest] if latest.is_file() else []), *transitions]
    if not found:
        raise MegatronExtError(
            f"{directory} holds no resume report: found neither {latest.name} nor "
            "transition-report-<iteration>.json. Give the directory that --selective-report named"
        )
    return found


def _make_page(source: Path) -> None:
    document = _read(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron's, about what it does without a GPU
            plots = draw(document)
        page = html_page(document, plots)
    except MegatronExtError:
        raise
    except Exception as e:  # another document fails in any way
        raise _no_report(source, f"{type(e).__name__}: {e}") from e
    target = source.with_suffix(".html")
    replace(target, page)
    for line in plots.absent:
        print(text.printable(f"{target.name}: {line}"))
    print(text.printable(f"{target}: written from {source.name}"))


def _read(file: Path) -> dict[str, Any]:
    from ..report.resume_report import SCHEMA

    try:
        with open_regular(file) as stream:
            content = stream.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise _no_report(file, f"it has more than {_LARGEST} bytes")
        document = json.loads(content.decode())
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError is a ValueError
        raise _no_report(file, f"{type(e).__name__}: {e}") from e
    found = document.get("schema") if isinstance(document, dict) else type(document).__name__
    if found != SCHEMA:
        raise _no_report(file, f"its schema is {found!r}, expected {SCHEMA!r}")
    return document


def _no_report(file: Path, why: str) -> MegatronExtError:
    return MegatronExtError(
        f"{file} is no resume report of this version: {why}. Give a directory that "
        "--selective-report of this version wrote to"
    )
