"""A small corpus for training runs, in Megatron's indexed format.

Megatron's mock data has 100,000 documents: shuffling the samples of 16 tokens that they make was a
third of a run.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np

DOCUMENTS, TOKENS, VOCABULARY = 1000, 40, 127

#: core/datasets/indexed_dataset.py (0.19.2): `_INDEX_HEADER`, version, and uint16 in `DType`.
_HEADER, _VERSION, _UINT16 = b"MMIDIDX\x00\x00", 1, 8


@functools.cache
def corpus() -> str:
    """Write the corpus once a process; returns the path of its two files without their ending."""
    directory = tempfile.mkdtemp(prefix="corpus")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    prefix = Path(directory) / "text"
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=(DOCUMENTS, TOKENS), dtype="<u2")
    prefix.with_suffix(".bin").write_bytes(tokens.tobytes())
    prefix.with_suffix(".idx").write_bytes(
        _HEADER
        + np.uint64(_VERSION).tobytes()
        + np.uint8(_UINT16).tobytes()
        + np.array([DOCUMENTS, DOCUMENTS + 1], "<u8").tobytes()
        + np.full(DOCUMENTS, TOKENS, "<i4").tobytes()
        + (np.arange(DOCUMENTS, dtype="<i8") * tokens[0].nbytes).tobytes()
        + np.arange(DOCUMENTS + 1, dtype="<i8").tobytes()
    )
    return str(prefix)
