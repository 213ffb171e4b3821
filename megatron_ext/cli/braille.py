"""A small plot in a terminal, two by four dots a character."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

#: Bit of each dot of a braille character, by column and row (Unicode, U+2800).
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))

Points = Sequence[tuple[float, float]]


def plot(lines: Sequence[Points], width: int = 64, height: int = 8) -> list[str]:
    """Draw lines over each other, from the lower left corner.

    Args:
        lines: Points (x, y) of each, with ascending x; y is at least 0.
        width: In characters.
        height: In characters.

    Returns:
        Lines of text, with the largest y at the left of the first and 0 at the last.
    """
    points = [p for line in lines for p in line]
    if not points:
        return []
    begin, end = min(x for x, _ in points), max(x for x, _ in points)
    top = max(y for _, y in points)
    cells = [[0] * width for _ in range(height)]
    columns, rows = 2 * width - 1, 4 * height - 1
    for line in lines:
        for column in range(columns + 1):
            x = begin + (end - begin) * column / columns
            y = _at(line, x)
            if y is not None:
                row = rows - round(y / top * rows) if top else rows
                cells[row // 4][column // 2] |= _DOTS[column % 2][row % 4]
    labels = [f"{top:.3g}", *[""] * (height - 2), "0"]
    left = max(map(len, labels))
    return [
        f"{label:>{left}} {''.join(chr(0x2800 + bits) for bits in row)}"
        for label, row in zip(labels, cells, strict=True)
    ]


def _at(line: Points, x: float) -> float | None:
    """A line's height, between two points straight; None where it has none."""
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        if x0 <= x <= x1:
            return y0 if x1 == x0 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return line[0][1] if len(line) == 1 and line[0][0] == x else None
