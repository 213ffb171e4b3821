"""Runs of the launcher, declared in a table and started two at a time.

A process takes 10 s to import Megatron, so that ranks are forked from one that has, but for the
runs that are about torchrun.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.training import ROOT, SCRIPT, Training, Zygote, run, words

#: Mark of the tests that run a training script.
needs_training = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None
    or importlib.util.find_spec("megatron.training") is None,
    reason="this megatron-core wheel does not ship the training loop",
)

#: Prints the token ids of every micro-batch; the same training script otherwise.
TOKENS = "tests/support/token_script.py"


@dataclass(frozen=True)
class Scenario:
    """One run.

    Args:
        arguments: Megatron's; ``{name}`` is the checkpoint directory of the run of that name,
            ``{directory}`` that of all runs.
        loads: The run whose checkpoint it loads.
        world: Number of ranks.
        launcher: Options of `megatron_ext.launch`.
        saves: Whether it saves to a directory of its own.
        script: Path in the repository; the demo's by default.
        after: Runs that come before it.
        kill_at: SIGKILL for every rank as it draws this micro-batch, counted from 1; with
            `TOKENS` only.
        fails: Whether the run is meant to fail; else a run after it fails too.
        torchrun: Whether torchrun starts the ranks.
        tamper: What ``tampering_script.py`` changes after the load.
        env: More environment.
    """

    arguments: str
    loads: str | None = None
    world: int = 1
    launcher: str = "--cpu"
    saves: bool = False
    script: str | None = None
    after: tuple[str, ...] = ()
    kill_at: int | None = None
    fails: bool = False
    torchrun: bool = False
    tamper: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def forked(self) -> bool:
        """Whether the ranks may share their imports; torch's AdamW is chosen at import."""
        return not self.torchrun and "--cpu-adam" not in self.launcher

    @property
    def earlier(self) -> tuple[str, ...]:
        """All runs that come before it."""
        return (*self.after, *([] if self.loads is None else [self.loads]))


class Runs:
    """Starts scenarios two at a time, those they depend on first."""

    def __init__(self, table: Mapping[str, Scenario], directory: Path, zygote: Zygote) -> None:
        self._table = table
        self._directory = directory
        self._executor = ThreadPoolExecutor(2)
        self._zygote = zygote
        self._futures: dict[str, Future[Training]] = {}

    def start(self, names: set[str]) -> None:
        wanted = set(itertools.chain.from_iterable(map(self._with_earlier, names)))
        # Submitted in dependency order to two workers, a run never waits for one not yet started.
        for name in sorted(wanted, key=lambda n: (self._depth(n), list(self._table).index(n))):
            self._futures[name] = self._executor.submit(self._run, name)

    def __getitem__(self, name: str) -> Training:
        return self._futures[name].result()

    def checkpoint(self, name: str) -> Path:
        return self._directory / name.replace(" ", "_").replace(",", "") / "checkpoint"

    def close(self) -> None:
        self._executor.shutdown(cancel_futures=True)

    def _with_earlier(self, name: str) -> Iterator[str]:
        yield name
        for other in self._table[name].earlier:
            yield from self._with_earlier(other)

    def _depth(self, name: str) -> int:
        return 1 + max(map(self._depth, self._table[name].earlier), default=-1)

    def words(self, name: str) -> list[str]:
        """The arguments that the script of a run is given."""
        return words(self._arguments(name), self.checkpoint(name).parent / "report")

    def _run(self, name: str) -> Training:
        scenario = self._table[name]
        for other in scenario.earlier:
            before = self._futures[other].result()
            meant = self._table[other].fails or self._table[other].kill_at is not None
            assert (before.returncode == 0) != meant, (other, before.log[-3000:])
        arguments = self._arguments(name)
        script = SCRIPT if scenario.script is None else ROOT / scenario.script
        directory = self.checkpoint(name).parent
        asked = {"KILL_AT_MICRO_BATCH": scenario.kill_at, "TAMPER": scenario.tamper}
        env = {name: str(value) for name, value in asked.items() if value is not None}
        env |= scenario.env
        start = self._zygote.run if scenario.forked else run
        return start(
            directory,
            arguments,
            world=scenario.world,
            launcher=scenario.launcher,
            script=script,
            env=env,
        )

    def _arguments(self, name: str) -> str:
        scenario = self._table[name]
        arguments = scenario.arguments.replace("{directory}", str(self._directory))
        for other in self._table:
            arguments = arguments.replace(f"{{{other}}}", str(self.checkpoint(other)))
        if scenario.loads is not None:
            arguments += f" --load {self.checkpoint(scenario.loads)}"
        if scenario.saves:
            arguments += f" --save {self.checkpoint(name)}"
        return arguments


def runs_of(
    table: Mapping[str, Scenario], request: pytest.FixtureRequest, directory: Path, zygote: Zygote
) -> Iterator[Runs]:
    """The runs that the selected tests of a module name in their ``reads`` marker."""
    runs = Runs(table, directory, zygote)
    wanted: set[str] = set()
    for item in request.session.items:
        if item.module is request.module and (marker := item.get_closest_marker("reads")):
            wanted.update(marker.args)
    runs.start(wanted)
    yield runs
    runs.close()


def ok(training: Training) -> Training:
    assert training.returncode == 0, training.log[-4000:]
    return training
