"""``python -m tests.support.reference``: write the generated parts of the documentation anew."""

from __future__ import annotations

from . import regenerated

for path, text in regenerated().items():
    path.write_text(text)
