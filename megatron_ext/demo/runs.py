"""Start a training run with torchrun and read Megatron's log."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("pretrain_gpt.py")

_LINE = re.compile(
    r"iteration\s+(?P<iteration>\d+)/.*?learning rate: (?P<lr>\S+).*?lm loss: (?P<loss>\S+)"
)
_ERROR = re.compile(r"^(?:\[rank\d+\]: )?(?P<error>[\w.]*(?:Error|Exception)\b.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Point:
    """One iteration as Megatron logged it.

    Args:
        iteration: Counted from 1.
        lr: Learning rate after the scheduler's step, that is, of the next iteration.
        loss: Mean loss per token, in nats.
    """

    iteration: int
    lr: float
    loss: float


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        name: Its name in the table.
        command: The full command line.
        returncode: Exit status of torchrun.
        seconds: Wall time.
        log: File with the output of all ranks.
        points: The logged iterations, in order.
        error: The first error line of the log if it failed.
        report: The JSON resume report, if one was written.
    """

    name: str
    command: list[str]
    returncode: int
    seconds: float
    log: Path
    points: list[Point]
    error: str | None
    report: dict[str, Any] | None

    @property
    def first_resumed_lr(self) -> float | None:
        """Learning rate of the first resumed step, from the resume report."""
        if self.report is None or self.report["scheduler"] is None:
            return None
        return float(self.report["scheduler"]["first_step"][0]["lr"])


def parse(text: str) -> list[Point]:
    """Read the iterations from a log of Megatron."""
    matches = map(_LINE.search, text.splitlines())
    return [Point(int(m["iteration"]), float(m["lr"]), float(m["loss"])) for m in matches if m]


def first_error(text: str) -> str | None:
    """Find the first error line in a log, which a rank wrote before torchrun's own messages."""
    match = _ERROR.search(text)
    return match["error"].strip() if match else None


def run(
    name: str,
    arguments: list[str],
    log: Path,
    report: Path | None = None,
    megatron: Path | None = None,
) -> Run:
    """Run the training script on two ranks over gloo.

    Args:
        name: Its name in the table.
        arguments: Megatron's arguments.
        log: File for the output of all ranks.
        report: Directory for its resume report, or None.
        megatron: Folder of another megatron-core, or None for the installed one.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if megatron:
        path = [str(megatron), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_ext.launch", "--cpu", str(SCRIPT)),
        *arguments,
    ]
    begin = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        try:
            returncode = process.wait()
        except BaseException:
            # torchrun forwards the signal to its ranks.
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            raise
    text = log.read_text(errors="replace")
    file = report / "resume-report.json" if report else None
    return Run(
        name=name,
        command=command,
        returncode=returncode,
        seconds=time.monotonic() - begin,
        log=log,
        points=parse(text),
        error=first_error(text) if returncode else None,
        report=json.loads(file.read_text()) if file and file.is_file() else None,
    )
