"""Tests with the optimizer classes of Transformer Engine, which `make test-te` puts on the path."""

from __future__ import annotations

import pytest

from tests.support import te_extension


@pytest.fixture(scope="session", autouse=True)
def transformer_engine(request: pytest.FixtureRequest) -> None:
    """Skip without Transformer Engine. With it every rank of the pools has it."""
    if not te_extension.available():
        end = pytest.fail if request.config.getoption("--require-te") else pytest.skip
        end("Transformer Engine is not installed; make test-te installs it and runs this test")
