"""``python -m megatron_ext.schemas``: write the JSON schemas anew, after a change of a document."""

from __future__ import annotations

from pathlib import Path

from . import generated

for name, text in generated().items():
    (Path(__file__).parent / name).write_text(text, encoding="utf-8")
