"""Measure what a resume costs with stock's DistributedOptimizer and with SelectiveAdam.

Nine minutes on 2 CPU cores; ``--quick`` is a try of a minute whose result says nothing,
``--published``, with more repeats at more sizes, takes 22 minutes, ``--full`` hours.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernel.environment import environment as facts_of
from benchmarks.kernel.environment import slug
from megatron_ext.host.contract import megatron_version

from . import report, scale
from .cases import DEFAULT, FULL, PUBLISHED, QUICK, Case
from .summary import verdicts

RESULTS = Path(__file__).parents[1] / "results"
_ROOT = Path(__file__).parents[2]
#: glibc raises these limits with the sizes it meets, and what it then keeps of freed memory differs
#: from load to load (mallopt(3)); fixed, the resident memory is that of the tensors.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def main() -> int:
    """Run all series and write the results; 1 if one failed or a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resume", description=__doc__)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_const", dest="cases", const=QUICK, help="a try")
    how.add_argument(
        "--published",
        action="store_const",
        dest="cases",
        const=PUBLISHED,
        help="enough repeats for every target",
    )
    how.add_argument("--full", action="store_const", dest="cases", const=FULL, help="all sizes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args()
    for content in measure(options.cases or DEFAULT):  # written after each, to be there if stopped
        name = content["facts"].get("GPU", content["facts"]["CPU"])
        stem = f"{content['facts']['date']}-resume-{content['device']}-{slug(name)}"
        files = report.write(options.out, stem, content)
    print("\n".join(f"written: {f}" for f in files))
    found = [
        v
        for case, result in report.series_of(content)
        for v in verdicts(case, result, content["device"])
    ]
    for v in found:
        print(f"{v.verdict}: {v.figure}: {v.found} (target {v.target or 'none'})")
    return int(bool(content["failed"]) or any(v.verdict == "missed" for v in found))


def measure(cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Run the series one after the other; after each, the results so far."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = {
        "date": datetime.date.today().isoformat(),
        "megatron-core": megatron_version(),
        **facts_of(device),
    }
    content: dict[str, Any] = {
        "device": device,
        "facts": facts,
        "scale": scale.simulate(),
        "series": [],
        "failed": [],
    }
    with tempfile.TemporaryDirectory() as directory:
        for number, case in enumerate(cases):
            print(f"{number + 1} of {len(cases)}: {case}", flush=True)
            try:
                content["series"].append(_series(case, Path(directory) / f"{number}.json"))
            except RuntimeError as e:
                print(e, flush=True)
                content["failed"].append(str(case))
            if content["series"]:
                yield content
    if not content["series"]:
        raise SystemExit("no series could be measured: see above")


def _series(case: Case, output: Path) -> dict[str, Any]:
    """Measure a series, first the times, then the memory.

    Raises:
        RuntimeError: A rank failed, or a resume did not give the state it should.
    """
    times = _ranks(case, "times", output, {})
    memory = _ranks(case, "memory", output, _MEMORY)
    return {"case": asdict(case), **times, "memory": memory["samples"]}


def _ranks(case: Case, what: str, output: Path, settings: dict[str, str]) -> dict[str, Any]:
    """Start the ranks of a series; what rank 0 wrote."""
    log = output.with_suffix(".log")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(case.ranks), "-m", "benchmarks.resume.ranks"),
        *(json.dumps(asdict(case)), what, str(output)),
    ]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // case.ranks))}
    environment = os.environ | threads | settings
    with log.open("w") as stream:
        done = subprocess.run(
            command, cwd=_ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment
        )
    if done.returncode:
        raise RuntimeError(f"{case}: exit code {done.returncode}\n{log.read_text()[-4000:]}")
    result: dict[str, Any] = json.loads(output.read_text())
    return result


if __name__ == "__main__":
    sys.exit(main())
