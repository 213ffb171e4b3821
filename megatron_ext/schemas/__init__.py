"""The JSON schemas of all documents; ``python -m megatron_ext.schemas`` writes the files here.

They are made from the types of the documents, so that an editor and a program in another language
read what mypy holds the writers to.
"""

from __future__ import annotations

from ..base.schema import Versioned
from ..cli import env_document
from ..cli.env_document import EnvDocument
from ..offline import documents, plan_document
from ..offline.documents import DiffDocument, StatisticsDocument
from ..offline.inspection import Inspection
from ..offline.plan_schema import PlanDocument
from ..offline.verified import Verification
from ..policy.schema import PolicyDocument
from ..report import resume_report
from ..report.schema import ReportDocument
from .generator import document


def generated() -> dict[str, str]:
    """Name of each file -> its text."""
    found = {
        "resume-policy": document("megatron_ext/resume-policy", PolicyDocument),
        "resume-report": document(resume_report.SCHEMA, ReportDocument),
        "inspect": document(
            documents.INSPECT,
            Versioned,
            Inspection,
            StatisticsDocument,
            description="What `python -m megatron_ext inspect CKPT --json` prints: what a "
            "checkpoint says of itself. NaN and infinity are the strings nan, inf and -inf; an "
            "object that is no plain data is its description.",
        ),
        "resume-plan": document(plan_document.SCHEMA, PlanDocument),
        "env": document(env_document.SCHEMA, EnvDocument),
        "diff": document(documents.DIFF, DiffDocument),
        "verify": document(
            documents.VERIFY,
            Versioned,
            Verification,
            description="What `python -m megatron_ext verify CKPT --json` prints: what reading a "
            "whole checkpoint has found. NaN and infinity are the strings nan, inf and -inf.",
        ),
    }
    return {f"{name}.schema.json": text for name, text in found.items()}
