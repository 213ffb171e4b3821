"""Rank pools that live as long as the test session, and the checkpoints the tests share."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.support import bridge_stand_ins
from tests.support.harness import Hyper, Layout
from tests.support.old_ranks import OldRanks
from tests.support.pool import RankPool
from tests.support.training import Zygote

FIRST = Hyper()
STEPS = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all",
        action="store_true",
        help="also run the tests marked `all`: more of what the others have examples of",
    )
    parser.addoption(
        "--require-bridge",
        action="store_true",
        help="fail the tests that need Megatron-Bridge, rather than skip them, without it",
    )
    parser.addoption(
        "--require-te",
        action="store_true",
        help="fail the tests that need Transformer Engine, rather than skip them, without it",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    left_out = [item for item in items if item.get_closest_marker("all")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def pools(request: pytest.FixtureRequest) -> Iterator[dict[str, RankPool]]:
    """Both kinds of ranks, which import Megatron at the same time; training runs too, if any."""
    pools = {kind: RankPool(kind) for kind in ("stock", "ext")}
    if any(item.get_closest_marker("e2e") for item in request.session.items):
        request.getfixturevalue("zygote")
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def stock(pools: dict[str, RankPool]) -> RankPool:
    """Ranks in which this package cannot be imported."""
    return pools["stock"]


@pytest.fixture(scope="session")
def ext(pools: dict[str, RankPool]) -> RankPool:
    """Ranks in which it can."""
    return pools["ext"]


@pytest.fixture(scope="session")
def bridge(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    """Ranks that have imported Megatron-Bridge too, which `make test-bridge` puts on the path."""
    if not bridge_stand_ins.available():
        end = pytest.fail if request.config.getoption("--require-bridge") else pytest.skip
        end("Megatron-Bridge cannot be imported; make test-bridge installs it and runs this test")
    pool = RankPool("bridge")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """A process that has imported Megatron and forks runs of one rank."""
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="session")
def megatron() -> Version:
    """The megatron-core the tests run against."""
    return Version(importlib.metadata.version("megatron-core"))


class Checkpoints:
    """Phase 1 of each layout, trained and saved by stock Megatron, once."""

    def __init__(self, pool: RankPool, directory: Path) -> None:
        self._pool = pool
        self._directory = directory
        self._made: dict[Any, tuple[str, list[dict[str, Any]]]] = {}

    def phase_1(
        self, layout: Layout, world: int, hyper: Hyper = FIRST
    ) -> tuple[str, list[dict[str, Any]]]:
        """The checkpoint directory, and per rank the state that was saved."""
        key = (layout, world, hyper)
        if key not in self._made:
            path = str(self._directory / f"phase1-{len(self._made)}")
            state = self._pool.run(
                "tests.support.oracle:phase_1",
                world,
                layout=layout,
                hyper=hyper,
                steps=STEPS,
                directory=path,
            )
            self._made[key] = (path, state)
        return self._made[key]


@pytest.fixture(scope="session")
def checkpoints(stock: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(stock, tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OldRanks]:
    """Checkpoints by older Megatrons."""
    ranks = OldRanks(tmp_path_factory.mktemp("old"), FIRST, STEPS)
    yield ranks
    ranks.close()
