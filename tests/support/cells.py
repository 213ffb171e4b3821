"""How many cells of a matrix were to be run."""

from __future__ import annotations

from typing import Any

import pytest


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
