"""Read the metadata of checkpoints of a trillion parameters and of two; minutes on one CPU core.

Every run is a process of its own, and what it says is held against the closed form.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.kernel.environment import busy_elsewhere, environment, slug

from . import report
from .measure import Case, Result, measure
from .synthetic import Moe, Sharding, counts, planned

RESULTS = Path(__file__).parents[1] / "results"

#: One layer of many, some rows of each of its matrices.
RULE = ("--selective-rule", "decoder.layers.7.*.linear_fc1.weight[8:]", "reset", "reset")
_RUN = "--lr 1e-4 --min-lr 1e-5 --train-iters 20 --global-batch-size 8".split()

#: Name -> its command line for a checkpoint; what it says is checked (`Result.require`).
COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "inspect": lambda directory: ["inspect", str(directory), "--json"],
    "plan": lambda directory: ["plan", str(directory), *_RUN, *RULE, "--json"],
}
#: A rule finds its parameters by their names, which buckets do not have.
BY_NAME = ("plan",)
SHARDINGS: tuple[Sharding, ...] = ("fully_reshardable", "dp_reshardable")


def main() -> int:
    """Run all cases and write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspect", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="of each run")
    parser.add_argument("--layers", type=int, default=64, help="of the smaller model")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args()
    gc.disable()  # of millions of objects that are made here none is garbage
    moe = Moe(layers=options.layers)
    facts = {"date": datetime.date.today().isoformat(), **environment("cpu")}
    before = busy_elsewhere()
    results: list[Result] = []
    for sharding, model in itertools.product(SHARDINGS, (moe, moe.twice())):
        writer = planned(model, sharding)
        for with_plans in (True, False):
            with tempfile.TemporaryDirectory() as parent:
                directory = Path(parent) / "checkpoint"
                writer.write(directory, with_plans)
                for name, command in COMMANDS.items():
                    if name in BY_NAME and sharding != "fully_reshardable":
                        continue
                    case = Case(name, sharding, with_plans, model.elements)
                    words = command(directory)
                    size = (directory / ".metadata").stat().st_size
                    found = measure(case, words, options.repeats, size)
                    if name == "inspect":
                        found.require(counts(model, sharding))
                    else:
                        found.require_rules(model)
                    results.append(found)
                    print(found.line(), flush=True)
    busy = [b - a for a, b in zip(before, busy_elsewhere(), strict=True)]
    share = f"{busy[0] / busy[1]:.0%}" if busy[1] else "unknown"
    facts["CPU time of other processes, those measured among them"] = share
    facts["model"] = str(moe)
    stem = f"{facts['date']}-inspect-cpu-{slug(str(facts['CPU']))}"
    options.out.mkdir(parents=True, exist_ok=True)
    files = report.write(options.out, stem, facts, results)
    print("\n".join(f"written: {f}" for f in files))
    print(files[1].read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
