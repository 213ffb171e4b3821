"""The files of a resume report: JSON, text, and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import report_page, report_plots
from .files import replace
from .printable import printable
from .report import ResumeReport

NAME = "resume-report"
#: Where the report of a transition stays when restarts replace the other one.
TRANSITION_NAME = "transition-report-{iteration}"


@dataclass(frozen=True)
class Written:
    """What came of writing a report.

    Args:
        files: The JSON first.
        troubles: What the page lacks, or why there is none.
    """

    files: tuple[Path, ...]
    troubles: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For the log."""
        first, *others = self.files
        names = "".join(f", {file.name}" for file in others)
        return [
            f"megatron_ext: resume report written to {first}{names}",
            *(f"megatron_ext: {NAME}.html: {printable(trouble)}" for trouble in self.troubles),
        ]


def write(report: ResumeReport, directory: Path, *, with_page: bool = True) -> Written:
    """Write a report into a directory; each file of an earlier one is replaced as a whole.

    The report of a transition is written a second time, under the iteration at which the phase
    began, so that a restart does not replace it. The page is left out where it cannot be made: that
    is no reason to stop a run.

    Args:
        report: What was done.
        directory: Created if it does not exist.
        with_page: False where more is to come: drawing it takes seconds.

    Raises:
        OSError: A file cannot be written.
        ValueError: The report has what JSON does not.
    """
    document = report.to_json()
    content = json.dumps(document, indent=2, allow_nan=False)
    lines = [*report.lines(), *report.scheduler_lines()]
    page, troubles = _page(document) if with_page else (None, ())
    texts = {".json": content, ".txt": "\n".join(map(printable, lines)), ".html": page}
    directory.mkdir(parents=True, exist_ok=True)
    files = []
    for name in _names(report):
        for suffix, text in texts.items():
            file = directory / f"{name}{suffix}"
            if text is None:
                file.unlink(missing_ok=True)  # an earlier resume's would be taken for this one's
            else:
                replace(file, text)
                files.append(file)
    return Written(tuple(files), troubles)


def _names(report: ResumeReport) -> list[str]:
    names = [NAME]
    if report.phase is not None and report.phase.state == "applied" and report.counters is not None:
        names.append(TRANSITION_NAME.format(iteration=report.counters[0].iteration))
    return names


def _page(document: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """The page, whatever is wrong with drawing it, and what is; None where there can be none."""
    try:
        plots = report_plots.draw(document)
        return report_page.page(document, plots), plots.failures
    except Exception as e:  # of the template engine, say: the run goes on without a page
        return None, (f"not written: {type(e).__name__}: {e}",)
