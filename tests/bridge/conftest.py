"""What the tests with Megatron-Bridge share: checkpoints of a first phase by stock Bridge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.bridge_runs import Bridge
from tests.support.pool import RankPool

TRAIN = "tests.support.bridge_runs:train"
#: Iterations of the first phase.
FIRST = 3


class FirstPhases:
    """Phase 1 of each layout, trained and saved by stock Bridge, once."""

    def __init__(self, pool: RankPool, directory: Path) -> None:
        self._pool = pool
        self._directory = directory
        self._made: dict[tuple[int, bool, str], tuple[str, list[dict[str, Any]]]] = {}

    def __call__(
        self, world: int, reshardable: bool = False, parallel: str = ""
    ) -> tuple[str, list[dict[str, Any]]]:
        """The checkpoint directory, and what `bridge_runs.train` returned on each rank."""
        key = (world, reshardable, parallel)
        if key not in self._made:
            path = str(self._directory / f"phase1-{len(self._made)}")
            run = Bridge(FIRST, save=path, reshardable=reshardable, parallel=parallel)
            self._made[key] = (path, self._pool.run(TRAIN, world, run=run))
        return self._made[key]


@pytest.fixture(scope="session")
def first(bridge: RankPool, tmp_path_factory: pytest.TempPathFactory) -> FirstPhases:
    return FirstPhases(bridge, tmp_path_factory.mktemp("bridge"))
