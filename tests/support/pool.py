"""A pool of rank processes that outlives a test: importing torch and Megatron takes 10 s a rank.

`RankPool.run` sends every rank the dotted name of a function and its arguments, and returns what
each rank returned, or raised. Ranks form a new gloo process group for every call.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Failure:
    """What one rank raised."""

    rank: int
    type: str
    message: str
    traceback: str


class RankFailed(AssertionError):
    """Raised by `RankPool.run` where no failure was expected."""


class RankPool:
    """Rank processes of one kind.

    Args:
        kind: ``"ext"``: this package can be imported. ``"stock"``: it cannot, so that what runs
            there is stock Megatron for certain.
        size: Largest number of ranks.
        overlay: What goes before everything else on the ranks' PYTHONPATH: another megatron-core
            (`.ci/overlay`).
    """

    def __init__(self, kind: str, size: int = 4, overlay: str | None = None) -> None:
        self.kind = kind
        self.size = size
        self._environment = _environment(overlay)
        self._workers: list[tuple[subprocess.Popen[bytes], Connection]] = []
        self._directory = tempfile.TemporaryDirectory(prefix="ranks")
        self._calls = 0

    def run(
        self,
        function: str,
        world: int,
        *,
        timeout: float = 240,
        allow_failure: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Call ``module:name`` on `world` ranks; per rank its value or its `Failure`."""
        self._grow(world)
        self._calls += 1
        store = str(Path(self._directory.name) / f"store{self._calls}")
        for rank in range(world):
            self._workers[rank][1].send((function, rank, world, store, kwargs))
        results: list[Any] = []
        deadline = time.monotonic() + timeout
        for rank in range(world):
            results.append(self._receive(rank, deadline))
        failures = [r for r in results if isinstance(r, Failure)]
        if failures and not allow_failure:
            raise RankFailed("\n".join(f"rank {f.rank}: {f.traceback}" for f in failures))
        return results

    def close(self) -> None:
        self._discard()
        self._directory.cleanup()

    def _receive(self, rank: int, deadline: float) -> Any:
        process, connection = self._workers[rank]
        while not connection.poll(0.2):
            if process.poll() is not None:
                code = process.returncode
                self._discard()
                raise RankFailed(f"rank {rank} died with exit code {code}")
            if time.monotonic() > deadline:
                self._discard()
                raise RankFailed(f"rank {rank} did not answer in time: the ranks hang")
        return connection.recv()

    def _discard(self) -> None:
        for process, connection in self._workers:
            connection.close()
            # A torch_dist save leaves helper processes behind: end the whole group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._workers = []

    def _grow(self, world: int) -> None:
        missing = range(len(self._workers), world)
        started = []
        for index in missing:
            address = str(Path(self._directory.name) / f"{self.kind}{index}-{time.monotonic_ns()}")
            listener = Listener(address, family="AF_UNIX")
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.worker", address, self.kind, str(index)],
                cwd=ROOT,
                env=self._environment,
                start_new_session=True,
            )
            started.append((process, listener))
        for process, listener in started:
            connection = listener.accept()
            listener.close()
            self._workers.append((process, connection))


def _environment(overlay: str | None = None) -> dict[str, str]:
    path = [overlay, os.environ.get("PYTHONPATH"), str(ROOT)]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
