"""Train phase 1 once and every variant of phase 2 from its checkpoint, two runs at a time.

Some six minutes on 2 CPU cores; ``--quick`` is a try of a minute whose result says nothing.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from benchmarks.kernel.environment import cpu_name, slug
from megatron_ext.host.contract import megatron_version
from megatron_ext.version import __version__

from . import report
from .runs import VARIANTS, Size, Study

RESULTS = Path(__file__).parents[1] / "results"


def main() -> int:
    """Run the study and write its results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transition", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few iterations, one seed")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args()
    size = Size(20, 10, (11,)) if options.quick else Size()
    with tempfile.TemporaryDirectory() as directory:
        study = Study(Path(directory), size)
        first = [p.loss for p in study.phase_1()]
        print(f"phase 1: loss {first[-1]:.4f} after {len(first)} iterations", flush=True)
        results: dict[str, dict[int, list[float]]] = {v.name: {} for v in VARIANTS}
        jobs = [(variant, seed) for seed in size.seeds for variant in VARIANTS]
        with ThreadPoolExecutor(2) as executor:
            runs = executor.map(lambda job: study.phase_2(*job), jobs)
            for (variant, seed), points in zip(jobs, runs, strict=True):
                losses = [p.loss for p in points]
                results[variant.name][seed] = losses
                print(f"{variant.name}, seed {seed}: loss {losses[-1]:.4f}", flush=True)
        facts = {
            "date": datetime.date.today().isoformat(),
            "megatron_ext": __version__,
            "megatron-core": megatron_version(),
            "torch": version("torch"),
            "python": platform.python_version(),
            "CPU": cpu_name(),
            "inner optimizer": "a stand-in for FusedAdam, fp32",
            "data": f"{study.tokens / 1e6:.1f} million bytes of Python's standard library",
        }
        stem = f"{facts['date']}-transition-cpu-{slug(str(facts['CPU']))}"
        options.out.mkdir(parents=True, exist_ok=True)
        files = report.write(options.out, stem, facts, size, first, results)
    print("\n".join(f"written: {f}" for f in files))
    print(files[1].read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
