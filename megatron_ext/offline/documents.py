"""The JSON documents of ``inspect`` and ``diff``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from ..base.schema import Versioned
from ..base.values import fields_as_json
from ..checkpoint.stored import StoredCheckpoint
from .comparison import Difference
from .inspection import Inspection
from .master_proof import MasterProof
from .moment_scan import TensorDistance, TensorStatistics
from .verified import Verification

INSPECT = "megatron_ext/inspect/1"
DIFF = "megatron_ext/diff/1"
VERIFY = "megatron_ext/verify/1"


class StatisticsDocument(TypedDict, total=False):
    """What ``inspect --moments`` adds.

    Attributes:
        statistics: With --moments: one entry per tensor, in the order of the index.
        master_weights: With --moments: whether the master weights are the model's weights.
    """

    statistics: list[TensorStatistics]
    master_weights: MasterProof


class _Differences(Versioned):
    """What is always printed.

    Attributes:
        a: Directory of the first checkpoint's iteration.
        b: Of the second's.
        differences: In the order in which they are worth reading; the moments' elements aside.
    """

    a: str
    b: str
    differences: list[Difference]


class DiffDocument(_Differences, total=False):
    """What ``python -m megatron_ext diff A B --json`` prints: how two checkpoints differ.

    NaN and infinity are the strings nan, inf and -inf.

    Attributes:
        distances: With --moments: the tensors that both have with the same key and shape.
        master_weights: With --moments: of a and of b, whether the master weights are the model's
            weights.
    """

    distances: list[TensorDistance]
    master_weights: list[MasterProof]


def inspect_document(
    found: Inspection,
    statistics: Iterable[TensorStatistics] | None,
    proof: MasterProof | None = None,
) -> dict[str, Any]:
    """What ``inspect --json`` prints: the fields of `Inspection`, and `StatisticsDocument`.

    Args:
        found: What a checkpoint says of itself.
        statistics: Of its moments; None where they were not read.
        proof: Of its master weights; None where they were not read.
    """
    more: StatisticsDocument = {}
    if statistics is not None:
        more["statistics"] = [fields_as_json(s) for s in statistics]
    if proof is not None:
        more["master_weights"] = fields_as_json(proof)
    fields: Any = fields_as_json(found)
    return {"schema": INSPECT, **fields, **more}


def diff_document(
    a: StoredCheckpoint,
    b: StoredCheckpoint,
    differences: Sequence[Difference],
    distances: Sequence[TensorDistance] | None,
    proofs: Sequence[MasterProof] | None = None,
) -> DiffDocument:
    """What ``diff --json`` prints.

    Args:
        a: The first checkpoint.
        b: The second.
        differences: Between them.
        distances: Of their moments; None where they were not read.
        proofs: Of the master weights of both; None where they were not read.
    """
    out: DiffDocument = {
        "schema": DIFF,
        "a": str(a.directory),
        "b": str(b.directory),
        "differences": [fields_as_json(d) for d in differences],
    }
    if distances is not None:
        out["distances"] = [fields_as_json(d) for d in distances]
    if proofs is not None:
        out["master_weights"] = [fields_as_json(p) for p in proofs]
    return out


def verify_document(found: Verification) -> dict[str, Any]:
    """What ``verify --json`` prints: the fields of `Verification`.

    Args:
        found: What reading the checkpoint has found.
    """
    fields: Any = fields_as_json(found)
    return {"schema": VERIFY, **fields}
