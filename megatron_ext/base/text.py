"""Text of a checkpoint, without what a terminal or a file would take for more than text."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""Text with what is not printable as ``\x1b``.

    Args:
        text: Any.
        keep: Characters that are left as they are.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
