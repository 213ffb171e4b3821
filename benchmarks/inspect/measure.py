"""A command in a process of its own: CPU seconds, peak memory, and what it said."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from .synthetic import Moe

_CODE = """
import re, sys, time
import torch
from megatron_ext.cli import main
begin = time.process_time()
status = main(sys.argv[1:])
end = time.process_time()
# Not getrusage: its peak is at least that of the process which started this one.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
print(end - begin, end, peak, file=sys.stderr)
sys.exit(status)
"""


@dataclass(frozen=True)
class Case:
    """What is run.

    Args:
        command: Its name.
        sharding: Of the checkpoint.
        with_plans: Whether the index keeps the plans of all ranks.
        elements: Parameters of the model.
    """

    command: str
    sharding: str
    with_plans: bool
    elements: int


@dataclass(frozen=True)
class Result:
    """Medians of the runs of a case.

    Args:
        case: What was run.
        seconds: CPU time of the command, imports aside.
        all_seconds: CPU time of the process, imports too.
        peak: Largest resident memory of the process in bytes.
        index: Bytes of ``.metadata``.
        runs: CPU times of the command, one a run.
        document: What the last run printed.
    """

    case: Case
    seconds: float
    all_seconds: float
    peak: int
    index: int
    runs: tuple[float, ...]
    document: dict[str, Any]

    def require(self, expected: tuple[int, int, int, int]) -> None:
        """Check the counts of every state.

        Raises:
            RuntimeError: The command said something else: the measurement is worth nothing.
        """
        fields = ("tensors", "chunks", "elements", "size")
        found = {m["state"]: tuple(m[f] for f in fields) for m in self.document["moments"]}
        if found != dict.fromkeys(("exp_avg", "exp_avg_sq", "param"), expected):
            raise RuntimeError(f"{self.case}: found {found}, expected {expected} for each state")

    def require_rules(self, model: Moe) -> None:
        """Check what the rule of `RULE`, and what no rule is for, come to.

        Raises:
            RuntimeError: The command said something else.
        """
        rows, columns = model.shapes["linear_fc1"]
        by_rule = model.experts, model.experts * (rows - 8) * columns
        tensors = 2 * model.experts * model.layers
        expected = [by_rule, (tensors, model.elements - by_rule[1])]
        (optimizer,) = self.document["optimizers"]
        found = [(r["parameters"], r["elements"]) for r in optimizer["rules"]]
        if found != expected:
            raise RuntimeError(f"{self.case}: found {found}, expected {expected} for each rule")

    def line(self) -> str:
        """For the terminal."""
        return (
            f"{self.case.command} {self.case.sharding}, plans {self.case.with_plans}, "
            f"{self.case.elements:.3g} parameters: {self.seconds:.2f} s, "
            f"{self.peak / 1e9:.2f} GB, index {self.index / 1e6:.0f} MB"
        )


def measure(case: Case, words: list[str], repeats: int, index: int) -> Result:
    """Run a command some times.

    Args:
        case: What it is.
        words: Its command line.
        repeats: How often.
        index: Bytes of the index, for the result.
    """
    figures, document = [], {}
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", _CODE, *words], capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1):  # 1: with warnings
            raise RuntimeError(f"{case}: {done.stderr}")
        figures.append([float(x) for x in done.stderr.split()[-3:]])
        document = json.loads(done.stdout)
    seconds, whole, peaks = zip(*figures, strict=True)
    return Result(
        case,
        statistics.median(seconds),
        statistics.median(whole),
        int(max(peaks)),
        index,
        tuple(seconds),
        document,
    )
