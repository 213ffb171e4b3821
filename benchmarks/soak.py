"""Damaged input and a long chain of phases, for as long as asked: ``make soak``.

Runs `tests/checkpoint/test_fuzz.py` and `tests/resume/test_chain.py`, and writes what they printed
to ``benchmarks/results``. The exit status is 1 if one of them fails.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

from benchmarks.kernel.environment import cpu_name, slug

RESULTS = Path(__file__).parent / "results"
_TOLD = re.compile(r"\d+ cases in |\d+ phases equal")
_PARTS = {
    "damaged and made-up input": "tests/checkpoint/test_fuzz.py",
    "a chain of phases on two ranks": "tests/resume/test_chain.py",
}


def main() -> int:
    """Run both parts and write the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="of damaged input")
    parser.add_argument("--phases", type=int, default=100, help="of the chain")
    options = parser.parse_args()
    env = {
        **os.environ,
        "MEGATRON_EXT_FUZZ_SECONDS": str(options.seconds),
        "MEGATRON_EXT_CHAIN": str(options.phases),
    }
    today = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [f"# make soak SECONDS={options.seconds:g} PHASES={options.phases}", ""]
    lines += [f"{today}, {cpu_name()}, {os.cpu_count()} CPUs."]
    failed = False
    for title, file in _PARTS.items():
        print(f"{title}: {file}", flush=True)
        command = [sys.executable, "-m", "pytest", "-v", "-s", file]
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        failed |= run.returncode != 0
        told = [line for line in run.stdout.splitlines() if _TOLD.search(line)]
        if run.returncode:
            print(run.stdout[-20_000:], run.stderr[-5_000:], flush=True)
        lines += ["", f"## {title} (`{file}`)", "", "```text", *told]
        lines += [run.stdout.splitlines()[-1], "```"]
    text = "\n".join(lines)
    print(text, flush=True)
    if not failed:
        (RESULTS / f"{today}-soak-{slug('cpu-' + cpu_name())}.md").write_text(text + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
