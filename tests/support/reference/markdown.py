"""Markdown from plain text: no markup of a source can be taken for the page's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_CODE = re.compile(r"(``.+?``|`[^`]+`)")
# An underscore inside a word is no emphasis, and the page's source stays readable.
_MARKUP = re.compile(r"[\\*\[\]<>$`]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|~(?=~)")


def words(text: str) -> str:
    """A line whose backquoted parts are code."""
    parts = _CODE.split(" ".join(text.split()))
    return "".join(p if _CODE.fullmatch(p) else _MARKUP.sub(r"\\\g<0>", p) for p in parts)


def code(text: str) -> str:
    """Text as it is typed."""
    return f"`{text}`"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, of Markdown cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(c.replace("|", r"\|") for c in line) + " |" for line in lines
    )


def preformatted(text: str) -> str:
    """Lines as they are."""
    return f"```text\n{text}\n```"


def blocks(*parts: str) -> str:
    """Blocks below each other."""
    return "\n\n".join(part for part in parts if part)
