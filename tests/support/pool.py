"""A pool of ranks that outlives a test: importing torch and Megatron takes 10 s a process.

`RankPool.run` sends the dotted name of a function and its arguments to a process that has imported
them. It forks a rank for each, with a new gloo process group: what a call leaves behind (the
threads of process groups above all, which go on polling) ends with its processes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import shutil
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


@functools.cache
def overlay(version: str) -> Path:
    """A folder with another megatron-core, installed once."""
    done = subprocess.run(
        [ROOT / ".ci" / "overlay", version], stdout=subprocess.PIPE, text=True, check=True
    )
    return Path(done.stdout.strip())


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
    """Ranks of one kind. Their process is started at once, and waited for at the first call.

    Args:
        kind: ``"ext"``: this package can be imported. ``"stock"``: it cannot, so that what runs
            there is stock Megatron for certain. ``"bridge"``: it can, and Megatron-Bridge too.
        overlay: What goes before everything else on the ranks' PYTHONPATH: another megatron-core
            (`.ci/overlay`).
    """

    def __init__(self, kind: str, overlay: str | None = None) -> None:
        self.kind = kind
        self._directory = tempfile.TemporaryDirectory(prefix="ranks")
        address = str(Path(self._directory.name) / kind)
        self._listener = Listener(address, family="AF_UNIX")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.worker", address, kind],
            cwd=ROOT,
            env=_environment(overlay),
            start_new_session=True,
        )
        self._connection: Connection | None = None
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
        if self._connection is None:
            self._connection = self._listener.accept()
        connection = self._connection
        self._calls += 1
        directory = Path(self._directory.name) / f"call{self._calls}"
        directory.mkdir()
        connection.send((function, world, str(directory), kwargs))
        # Ends of an earlier call's ranks may come first.
        while not isinstance(pids := connection.recv(), list):
            pass
        try:
            results = _results(directory, pids, connection, time.monotonic() + timeout)
        finally:
            for pid in pids:
                # A torch_dist save leaves helper processes behind: end the whole group.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            shutil.rmtree(directory)
        failures = [r for r in results if isinstance(r, Failure)]
        if failures and not allow_failure:
            raise RankFailed("\n".join(f"rank {f.rank}: {f.traceback}" for f in failures))
        return results

    def close(self) -> None:
        self._listener.close()
        if self._connection is not None:
            self._connection.close()
        self._process.kill()
        self._process.wait()
        self._directory.cleanup()


def _results(
    directory: Path, pids: list[int], connection: Connection, deadline: float
) -> list[Any]:
    """What each rank has written.

    Raises:
        RankFailed: A rank died without a word, or does not answer in time.
    """
    results: dict[int, Any] = {}
    dead: dict[int, int] = {}
    while len(results) < len(pids):
        while connection.poll(0.01):
            pid, code = connection.recv()
            if pid in pids:
                dead[pids.index(pid)] = code
        for rank in set(range(len(pids))) - results.keys():
            file = directory / f"result{rank}"
            if file.exists():
                results[rank] = pickle.loads(file.read_bytes())
            elif rank in dead:
                raise RankFailed(f"rank {rank} died with exit code {dead[rank]}")
        if time.monotonic() > deadline:
            missing = sorted(set(range(len(pids))) - results.keys())
            raise RankFailed(f"ranks {missing} did not answer in time: they hang")
    return [results[rank] for rank in range(len(pids))]


def _environment(overlay: str | None = None) -> dict[str, str]:
    path = [overlay, os.environ.get("PYTHONPATH"), str(ROOT)]
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
