"""Text of messages: no control characters or terminal escapes, and lists that stay short."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from ..errors import printable as printable

#: Number of items of a list that a message names.
MAX_NAMED = 8


def first_of(items: Sequence[str]) -> str:
    """Join the first `MAX_NAMED` items of a list, and say how many more there are."""
    named = ", ".join(items[:MAX_NAMED])
    return named if len(items) <= MAX_NAMED else f"{named} and {len(items) - MAX_NAMED} more"


class Summary:
    """Shows a short summary of a large object in a console and in a notebook."""

    def summary(self) -> Mapping[str, object]:
        """Return what it shows: names and values."""
        raise NotImplementedError

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}: {value}" for name, value in self.summary().items())
        return printable(f"<{type(self).__name__} {shown}>")

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(printable(str(value)))}</td></tr>"
            for name, value in self.summary().items()
        )
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"
