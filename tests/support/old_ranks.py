"""Ranks of older Megatrons, and what they wrote."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .harness import Hyper, Layout
from .pool import RankPool, overlay
from .unsharded import State


@dataclass
class OldRanks:
    """Ranks of a version are started once, and a checkpoint is written once.

    A version that cannot be installed is an error, and so the test's failure.
    """

    directory: Path
    hyper: Hyper
    steps: int
    pools: dict[str, RankPool] = field(default_factory=dict)
    made: dict[Any, tuple[str, dict[str, Any]]] = field(default_factory=dict)

    def start(self, versions: Iterable[str]) -> None:
        """Start the ranks of some versions at the same time."""
        for version in versions:
            self.ranks(version)

    def write(
        self, version: str, layout: Layout, world: int = 2, nemo: bool = False
    ) -> tuple[str, dict[str, Any]]:
        """A checkpoint's directory and the state that was saved, unsharded."""
        key = (version, layout, world, nemo)
        if key not in self.made:
            path = str(self.directory / f"{len(self.made)}" / f"iter_{self.steps:07d}")
            Path(path).parent.mkdir()
            (saved, *_) = self.ranks(version).run(
                "tests.support.old:written",
                world,
                layout=layout,
                hyper=self.hyper,
                steps=self.steps,
                directory=path,
                nemo=nemo,
            )
            assert saved["version"].split("+")[0] == version
            assert saved["steps"] == [self.steps]
            assert_worth_comparing(saved["state"])
            (Path(path).parent / "latest_checkpointed_iteration.txt").write_text(str(self.steps))
            self.made[key] = (path, saved)
        return self.made[key]

    def ranks(self, version: str) -> RankPool:
        """The ranks of a version."""
        if version not in self.pools:
            self.pools[version] = RankPool("stock", str(overlay(version)))
        return self.pools[version]

    def close(self) -> None:
        for pool in self.pools.values():
            pool.close()


def assert_same_state(found: State, expected: State, half: float = 1, quarter: float = 1) -> None:
    """Bit for bit; a power of two changes no bit but the exponent's."""
    assert found.keys() == expected.keys()
    factors = {"param": 1.0, "exp_avg": half, "exp_avg_sq": quarter}
    for name, tensors in expected.items():
        assert found[name].keys() == tensors.keys() == factors.keys()
        for key, values in tensors.items():
            wanted = values * np.float32(factors[key])
            np.testing.assert_array_equal(found[name][key], wanted, err_msg=f"{name} {key}")


def assert_worth_comparing(state: State) -> None:
    for key in ("param", "exp_avg", "exp_avg_sq"):
        values = np.concatenate([tensors[key] for tensors in state.values()], axis=None)
        assert np.count_nonzero(values) > values.size / 4
        assert np.unique(values).size > values.size / 8
