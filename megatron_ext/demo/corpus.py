"""Real text that every machine has: the source bytes of Python's standard library."""

from __future__ import annotations

import sysconfig
import warnings
from pathlib import Path

import numpy as np

#: Bytes are tokens 0 to 255; the next one ends a document.
END_OF_DOCUMENT = 256


def build(prefix: Path, megabytes: float = 4.0) -> int:
    """Write an IndexedDataset of Megatron, one document per file.

    Args:
        prefix: Path of the ``.bin`` and ``.idx`` files without the ending.
        megabytes: Stop after this many million tokens.

    Returns:
        Number of tokens written.

    Raises:
        FileNotFoundError: This Python has no standard library sources.
    """
    import torch

    with warnings.catch_warnings():
        # Megatron warns about every optional package that is missing.
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(library.glob("*.py"))
    if not files:
        raise FileNotFoundError(f"no Python sources in {library} to train on")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(str(prefix.with_suffix(".bin")), dtype=np.uint16)
    tokens = 0
    for file in files:
        text = np.frombuffer(file.read_bytes(), dtype=np.uint8).astype(np.int64)
        builder.add_item(torch.from_numpy(np.append(text, END_OF_DOCUMENT)))
        builder.end_document()
        tokens += len(text) + 1
        if tokens >= megabytes * 1e6:
            break
    builder.finalize(str(prefix.with_suffix(".idx")))
    return tokens
