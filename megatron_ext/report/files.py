"""Write the files of a resume report: JSON and text.

``python -m megatron_ext report`` makes the HTML page from the JSON, so that a run needs neither
matplotlib nor Jinja2.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from ..base.files import replace
from ..base.text import printable
from .resume_report import ResumeReport

NAME = "resume-report"
#: Name of the report of a transition, which a restart does not replace.
TRANSITION_NAME = "transition-report-{iteration}"


def writer(directory: Path) -> Callable[[ResumeReport], str]:
    """Make the function with which a `megatron_ext.resume.session.Resume` writes its report.

    Args:
        directory: As for `write`.

    Returns:
        A function that writes a report with `write` and returns a line for the log. The line names
        the files and the command that makes the page.
    """

    def write_report(report: ResumeReport) -> str:
        first, *others = write(report, directory)
        names = "".join(f", {file.name}" for file in others)
        command = f"python -m megatron_ext report {shlex.quote(str(directory))}"
        return printable(f"megatron_ext: resume report written to {first}{names}; page: {command}")

    return write_report


def write(report: ResumeReport, directory: Path) -> Sequence[Path]:
    """Write a report to a directory. Each file of an earlier report is replaced atomically.

    The report of a transition is also written under the iteration at which the phase began, so that
    a restart does not replace it. A page of a replaced file is removed first, so that it cannot be
    mistaken for the new report's.

    Args:
        report: The report.
        directory: The directory. It is created if it does not exist.

    Returns:
        The files, the JSON first.

    Raises:
        OSError: A file cannot be written.
        ValueError: The report has a number that JSON lacks.
    """
    content = json.dumps(report.to_json(), indent=2, allow_nan=False)
    lines = [*report.lines(), *report.scheduler_lines()]
    texts = {".json": content, ".txt": "\n".join(map(printable, lines))}
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for name in _names(report):
        (directory / f"{name}.html").unlink(missing_ok=True)
        for suffix, text in texts.items():
            files.append(directory / f"{name}{suffix}")
            replace(files[-1], text)
    return files


def _names(report: ResumeReport) -> list[str]:
    names = [NAME]
    if report.phase is not None and report.phase.state == "applied" and report.counters is not None:
        names.append(TRANSITION_NAME.format(iteration=report.counters[0].iteration))
    return names
