"""Run an ordinary training script with megatron.training, with or without the launcher."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.text import corpus

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "megatron_ext" / "demo" / "pretrain_gpt.py"

ARGUMENTS = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64
    --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 8
    --tokenizer-type NullTokenizer --vocab-size 127 --num-workers 0
    --log-interval 1 --eval-iters 0 --eval-interval 1000 --save-interval 1000 --seed 1
    --transformer-impl local --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-persist-layer-norm --distributed-backend gloo
""".split()

#: Environment variable by which the processes of a run are found again.
_MARK = "MEGATRON_EXT_TEST_RUN"

_TOKENS = re.compile(r"TOKENS rank (\d+): \[(.*)\]")

_LOSS = re.compile(r"LOSS rank (\d+): (\S+)")

_LINE = re.compile(
    r"iteration\s+(\d+)/.*?consumed samples:\s+(\d+).*?learning rate: (\S+).*?lm loss: (\S+)"
)


@dataclass(frozen=True)
class Training:
    """What a run printed.

    Args:
        returncode: Of torchrun.
        log: stdout and stderr of all ranks.
        ranks: What each rank printed, by rank.
        report: The JSON resume report, where one was asked for.
    """

    returncode: int
    log: str
    ranks: dict[int, str]
    report: dict[str, Any] | None

    @property
    def iterations(self) -> dict[int, tuple[int, float, str]]:
        """Iteration -> consumed samples, learning rate after the step, loss as it was printed."""
        return {
            int(m[1]): (int(m[2]), float(m[3]), m[4])
            for m in map(_LINE.search, self.log.splitlines())
            if m
        }

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """The token ids of each sample that rank 0 drew, in order."""
        found = (m for m in map(_TOKENS.search, self.log.splitlines()) if m and m[1] == "0")
        return [tuple(map(int, m[2].split(","))) for m in found]

    @property
    def exact_losses(self) -> list[str]:
        """The loss of each iteration on rank 0, with all its digits."""
        found = (m for m in map(_LOSS.search, self.log.splitlines()) if m and m[1] == "0")
        return [m[2] for m in found]

    @property
    def losses(self) -> list[str]:
        return [loss for _, _, loss in self.iterations.values()]

    @property
    def lrs(self) -> list[float]:
        return [lr for _, lr, _ in self.iterations.values()]


def run(
    directory: Path,
    arguments: str,
    *,
    world: int = 2,
    launcher: str = "--cpu",
    script: Path = SCRIPT,
    timeout: float = 150,
    env: dict[str, str] | None = None,
) -> Training:
    """Start torchrun and wait for it.

    Args:
        directory: For logs and, with ``{report}`` in the arguments, the report.
        arguments: Megatron's arguments beyond `ARGUMENTS`; they win over those.
        world: Number of ranks.
        launcher: Options of `megatron_ext.launch`.
        script: The training script.
        timeout: Seconds until the run counts as hanging.
        env: More environment.
    """
    directory.mkdir(parents=True, exist_ok=True)
    logs = directory / "logs"
    report = directory / "report"
    command = [
        *(
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(world),
        ),
        *("--log-dir", str(logs), "--redirects", "3", "--tee", "0"),
        *("-m", "megatron_ext.launch", *launcher.split(), str(script)),
        *words(arguments, report),
    ]
    output = directory / "torchrun.log"
    with output.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment({**(env or {}), _MARK: str(directory)}),
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs: {' '.join(command)}\n{_logs(logs)}") from None
        finally:
            _kill(process, str(directory))
    ranks = _logs(logs)
    return Training(
        process.returncode,
        output.read_text() + "".join(ranks.values()),
        ranks,
        _report(report),
    )


class Zygote:
    """Runs whose ranks are forked from a process that has imported Megatron already."""

    def __init__(self) -> None:
        # Another test session on the machine has one too, and ends its own only.
        self._mark = f"zygote of {os.getpid()}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.zygote"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=environment({_MARK: self._mark}),
        )
        self._answers: dict[str, queue.SimpleQueue[int]] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def run(
        self,
        directory: Path,
        arguments: str,
        *,
        launcher: str,
        script: Path,
        world: int = 1,
        timeout: float = 150,
        env: dict[str, str] | None = None,
    ) -> Training:
        """As `run`, without torchrun."""
        directory.mkdir(parents=True, exist_ok=True)
        logs = [directory / f"rank{rank}.log" for rank in range(world)]
        report = directory / "report"
        argv = [*launcher.split(), str(script), *words(arguments, report)]
        env = {**(env or {}), "MASTER_ADDR": "localhost", "MASTER_PORT": str(_free_port())}
        answer = self._answers[str(directory)] = queue.SimpleQueue()
        request = {
            "id": str(directory),
            "argv": argv,
            "logs": [str(log) for log in logs],
            "env": env,
        }
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        try:
            returncode = answer.get(timeout=timeout)
        except queue.Empty:
            texts = [log.read_text() for log in logs if log.is_file()]
            raise AssertionError("\n".join([f"hangs: {' '.join(argv)}", *texts])) from None
        ranks = {rank: log.read_text(errors="replace") for rank, log in enumerate(logs)}
        return Training(returncode, "".join(ranks.values()), ranks, _report(report))

    def close(self) -> None:
        _kill(self._process, self._mark)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            answer = json.loads(line)
            self._answers[answer["id"]].put(answer["rc"])


def _free_port() -> int:
    """A port to listen on that nothing else will be given before the ranks do.

    Ports from 32768 on are what the system gives to connections, such as those of other ranks.
    """
    while True:
        port = random.randrange(10_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


def words(arguments: str, report: Path) -> list[str]:
    """Megatron's arguments, with a corpus and its cache unless they name data of their own."""
    words = arguments.format(report=report).split()
    data = ["--data-path", corpus(), "--data-cache-path", str(report.parent / "cache")]
    common = list(ARGUMENTS)
    if "--step-batch-size-schedule" in words:  # Megatron refuses both
        at = common.index("--global-batch-size")
        del common[at : at + 2]
    return [*common, *([] if "--data-path" in words else data), *words]


def _report(directory: Path) -> dict[str, Any] | None:
    file = directory / "resume-report.json"
    return json.loads(file.read_text()) if file.is_file() else None


def environment(env: dict[str, str] | None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **(env or {})}


def _kill(process: subprocess.Popen[Any], mark: str) -> None:
    """End a run and everything it started: writers of a save outlive their rank."""
    process.kill()
    process.wait()
    wanted = f"{_MARK}={mark}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


def _logs(logs: Path) -> dict[int, str]:
    """torchrun writes <run>/attempt_0/<rank>/{stdout,stderr}.log."""
    texts: dict[int, str] = {}
    for file in sorted(logs.rglob("*.log")):
        rank = int(file.parent.name)
        texts[rank] = texts.get(rank, "") + file.read_text(errors="replace")
    return texts
