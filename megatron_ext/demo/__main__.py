"""Two phases of a real pre-training on two CPU ranks: stock Megatron beside `SelectiveAdam`."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from ..cli.output import require_package
from ..errors import MegatronExtError
from ..host.contract import megatron_version, require_training
from . import corpus, plot, table
from .runs import Run, run

PHASE_1_ITERATIONS = 400
PHASE_2_ITERATIONS = 150
TOTAL = PHASE_1_ITERATIONS + PHASE_2_ITERATIONS

MODEL = """
    --num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 256
    --seq-length 64 --max-position-embeddings 64 --micro-batch-size 8 --global-batch-size 16
    --bf16 --use-distributed-optimizer --ckpt-format torch_dist --distributed-backend gloo
    --tokenizer-type NullTokenizer --split 100,0,0 --num-workers 0 --seed 1234
    --log-interval 1 --eval-iters 0 --eval-interval 100000 --save-interval 100000
    --lr-decay-style cosine --lr-warmup-iters 10 --weight-decay 0.1 --adam-beta2 0.95
    --attention-dropout 0.0 --hidden-dropout 0.0 --transformer-impl local
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-persist-layer-norm
""".split()
UNCHANGED = "--lr 3e-3 --min-lr 3e-4 --lr-decay-iters 2000".split()
LOWER = "--lr 6e-4 --min-lr 6e-5 --lr-decay-iters 2000".split()
OVERRIDE = ["--override-opt_param-scheduler"]
OURS = ["--optimizer-class", "megatron_ext.SelectiveAdam"]
#: What --no-load-optim does to the moments, without what it does to the schedule.
RESET = [*OURS, "--selective-preset", "reset"]

#: Key -> name of the run.
NAMES = {
    "older": "stock 0.18, lower lr",
    "stock": "stock, lower lr",
    "selective": "SelectiveAdam, lower lr",
    "reset": "moments reset, unchanged arguments",
    "stock-unchanged": "stock, unchanged arguments",
    "selective-unchanged": "SelectiveAdam, unchanged arguments",
}
#: Title of a column of the picture -> a run, and ours with the same arguments and kept moments.
PICTURE = {
    "lower lr: 0.18 keeps the old one": ("older", "selective"),
    "same lr: without the moments": ("reset", "selective-unchanged"),
}


def main() -> int:
    """Run everything, print the table and write the output directory; return 0 on success."""
    parser = argparse.ArgumentParser(prog="python -m megatron_ext.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="output directory")
    parser.add_argument(
        "--older",
        type=Path,
        metavar="DIR",
        help="folder of megatron-core 0.18, for the learning rate that it keeps",
    )
    options = parser.parse_args()
    out, older = options.out.resolve(), options.older
    try:
        require_package("matplotlib", "the figure of the demo")
        require_training()
    except MegatronExtError as e:
        parser.error(str(e))
    _empty(out)
    tokens = corpus.build(out / "data" / "stdlib")
    print(f"data: {tokens / 1e6:.1f} million bytes of Python's standard library", flush=True)
    # 0.18 cannot open a checkpoint of 0.19.
    first = _start(
        out,
        "phase-1",
        "phase 1",
        UNCHANGED,
        PHASE_1_ITERATIONS,
        saves=True,
        megatron=older,
    )
    if first.returncode or not first.points:
        return _fail([f"phase 1 failed: {first.error}"], first)
    arguments = {
        **({"older": [*LOWER, *OVERRIDE]} if older else {}),
        "stock": [*LOWER, *OVERRIDE],
        "selective": [*LOWER, *OURS],
        "reset": [*UNCHANGED, *RESET],
        "stock-unchanged": [*UNCHANGED, *OVERRIDE],
        "selective-unchanged": [*UNCHANGED, *OURS],
    }
    runs = {
        key: _start(out, key, NAMES[key], words, megatron=older if key == "older" else None)
        for key, words in arguments.items()
    }
    _write(out, first, runs)
    print(f"\n{table.text(list(runs.values()))}\n")
    problems = _problems(runs)
    if problems:
        return _fail(problems, runs["selective"])
    lr = runs["selective"].first_resumed_lr
    print(f"SelectiveAdam's first resumed step: lr {lr:.6e} (from its resume report)")
    print("with unchanged arguments SelectiveAdam and stock logged the same lr and loss throughout")
    print(f"curves, report, logs and results: {out}")
    return 0


def _start(
    out: Path,
    key: str,
    name: str,
    words: list[str],
    iterations: int = TOTAL,
    *,
    saves: bool = False,
    megatron: Path | None = None,
) -> Run:
    report = out / "reports" / key if OURS[0] in words else None
    arguments = [*MODEL, *words, "--train-iters", str(iterations)]
    arguments += ["--data-path", str(out / "data" / "stdlib")]
    arguments += ["--data-cache-path", str(out / "data" / "cache")]
    arguments += ["--vocab-size", str(corpus.END_OF_DOCUMENT + 1)]
    arguments += ["--save" if saves else "--load", str(out / "checkpoint")]
    arguments += ["--selective-report", str(report)] if report else []
    done = run(name, arguments, out / "logs" / f"{key}.log", report, megatron)
    what = "failed" if done.returncode else f"{len(done.points)} iterations"
    print(f"{name}: {what}, {done.seconds:.0f} s", flush=True)
    return done


def _empty(out: Path) -> None:
    """Remove the output of an earlier demo, but no other directory."""
    if out.exists() and any(out.iterdir()) and not (out / "logs").is_dir():
        raise SystemExit(
            f"{out} exists and is not the output of an earlier demo. Name another one with --out"
        )
    shutil.rmtree(out, ignore_errors=True)
    (out / "logs").mkdir(parents=True)


def _write(out: Path, first: Run, runs: dict[str, Run]) -> None:
    ordered = list(runs.values())
    columns = {
        title: (runs[stock], runs[ours])
        for title, (stock, ours) in PICTURE.items()
        if stock in runs and runs[stock].points and runs[ours].points
    }
    if columns:
        plot.curves(first, columns, out / "curves.png")
    (out / "table.md").write_text(table.markdown(ordered))
    source = out / "reports" / "selective" / "resume-report.json"
    if source.is_file():
        shutil.copy(source, out / "resume-report.json")
    results = {
        "python": platform.python_version(),
        "torch": version("torch"),
        "megatron-core": megatron_version(),
        "machine": platform.platform(),
        "runs": {
            key: {
                "name": r.name,
                "command": r.command,
                "returncode": r.returncode,
                "seconds": round(r.seconds, 1),
                "error": r.error,
                "first_resumed_lr": r.first_resumed_lr,
                "points": [asdict(p) for p in r.points],
            }
            for key, r in {"phase-1": first, **runs}.items()
        },
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def _problems(runs: dict[str, Run]) -> list[str]:
    ours, beside = runs["selective"], runs["selective-unchanged"]
    problems = []
    if ours.returncode or not ours.points:
        problems.append(f"{ours.name} failed: {ours.error}")
    elif ours.first_resumed_lr is None or ours.first_resumed_lr > float(LOWER[1]):
        problems.append(
            f"{ours.name}: the first learning rate is {ours.first_resumed_lr}, not the new one"
        )
    if not beside.points or beside.points != runs["stock-unchanged"].points:
        problems.append("with unchanged arguments SelectiveAdam and stock differ")
    return problems


def _fail(problems: list[str], culprit: Run) -> int:
    print("\n".join(problems), file=sys.stderr)
    print(f"the end of {culprit.log}:", file=sys.stderr)
    print("\n".join(culprit.log.read_text().splitlines()[-30:]), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
