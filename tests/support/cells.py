"""Which cells of a matrix are run, and how many were to be."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def of_every_version(
    cells: Iterable[Any], some: Collection[Any], default: Collection[Any] | None = None
) -> list[Any]:
    """The cells as parameters; `some` are run against the older versions of the matrix too.

    Args:
        cells: All cells.
        some: Some of them.
        default: Those that are run without --all, beside `some`; all where it is None.
    """
    cells = list(cells)
    assert {*some, *(default or ())} <= set(cells)
    out = []
    for cell in cells:
        marks = [pytest.mark.matrix] if cell in some else []
        if default is not None and cell not in {*some, *default}:
            marks.append(pytest.mark.all)
        out.append(pytest.param(*(cell if isinstance(cell, tuple) else (cell,)), marks=marks))
    return out


def with_all(cells: Iterable[Any], default: Collection[Any]) -> list[Any]:
    """The cells as parameters; those that are not in `default` are run with --all only."""
    return of_every_version(cells, (), default)


def chosen(request: pytest.FixtureRequest, test: Any) -> int:
    """How often a parametrized test of this module is in the session.

    Args:
        request: Of a test of the same module.
        test: The test's function.
    """
    return sum(
        item.module is request.module
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.originalname == test.__name__
    )
