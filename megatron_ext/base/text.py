"""Make text from a checkpoint safe to print: no control characters, no terminal escapes."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""Escape every character that is not printable, as in ``\x1b``.

    Args:
        text: Any text.
        keep: Characters that are left as they are.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
