"""Document nodes from plain text: no markup of a source can be taken for the page's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from docutils import nodes

Cell = str | Sequence[nodes.Node]

_CODE = re.compile(r"(``.+?``|`[^`]+`)")


def words(text: str) -> list[nodes.Node]:
    """Text whose backquoted parts are code."""
    out: list[nodes.Node] = []
    for part in _CODE.split(text):
        if _CODE.fullmatch(part):
            out.append(code(part.strip("`")))
        elif part:
            out.append(nodes.Text(part))
    return out


def code(text: str) -> nodes.literal:
    """Text as it is typed."""
    return nodes.literal(text, text)


def line_break() -> nodes.raw:
    """Where a long name may be broken."""
    return nodes.raw("", "<wbr>", format="html")


def paragraph(content: Cell) -> nodes.paragraph:
    """A paragraph."""
    return nodes.paragraph("", "", *_inline(content))


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]]) -> nodes.table:
    """A table.

    Args:
        head: Names of the columns.
        rows: Of one cell a column: text, or inline nodes.
    """
    group = nodes.tgroup("", cols=len(head))
    group += [nodes.colspec(colwidth=1) for _ in head]
    group += nodes.thead("", _row(head))
    group += nodes.tbody("", *map(_row, rows))
    return nodes.table("", group, classes=["colwidths-auto"])


def section(title: str, identifier: str, *content: nodes.Node) -> nodes.section:
    """A section below the one that the directive stands in.

    Args:
        title: Its heading.
        identifier: Its anchor.
        content: What is in it.
    """
    name = nodes.fully_normalize_name(title)
    return nodes.section("", nodes.title(title, title), *content, ids=[identifier], names=[name])


def preformatted(text: str) -> nodes.literal_block:
    """Lines as they are."""
    return nodes.literal_block(text, text, language="text")


def anchor(*parts: str) -> str:
    """An HTML anchor."""
    return nodes.make_id("-".join(parts))


def _row(cells: Iterable[Cell]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", paragraph(cell)) for cell in cells))


def _inline(content: Cell) -> Sequence[nodes.Node]:
    return words(content) if isinstance(content, str) else content
