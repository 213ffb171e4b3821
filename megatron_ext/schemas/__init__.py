"""The JSON schemas of all documents; ``python -m megatron_ext.schemas`` writes the files here.

They are made from the types of the documents, so that an editor and a program in another language
read what mypy holds the writers to.
"""

from __future__ import annotations

from ..base.schema import document
from ..policy.schema import PolicyDocument
from ..report import resume_report
from ..report.schema import ReportDocument


def generated() -> dict[str, str]:
    """Name of each file -> its text."""
    found = {
        "resume-policy": document("megatron_ext/resume-policy", PolicyDocument),
        "resume-report": document(resume_report.SCHEMA, ReportDocument),
    }
    return {f"{name}.schema.json": text for name, text in found.items()}
