"""Which cells of a matrix are run, and how many were to be."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def of_every_version(cells: Iterable[Any], some: Collection[Any]) -> list[Any]:
    """The cells as parameters; `some` are run against the older versions of the matrix too."""
    return _marked(cells, some, inside=[pytest.mark.matrix], outside=[])


def with_all(cells: Iterable[Any], some: Collection[Any]) -> list[Any]:
    """The cells as parameters; those that are not among `some` are run with --all only."""
    return _marked(cells, some, inside=[], outside=[pytest.mark.all])


def _marked(
    cells: Iterable[Any],
    some: Collection[Any],
    inside: list[pytest.MarkDecorator],
    outside: list[pytest.MarkDecorator],
) -> list[Any]:
    cells = list(cells)
    assert set(some) <= set(cells)
    return [
        pytest.param(
            *(cell if isinstance(cell, tuple) else (cell,)),
            marks=inside if cell in some else outside,
        )
        for cell in cells
    ]


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
