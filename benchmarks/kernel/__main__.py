"""Measure the moment ops against their peers and write a dated result."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from . import report, shapes
from .environment import busy_elsewhere, environment, slug
from .measure import measure
from .operations import BATCH_SIZE, COMPARE, OPERATIONS, THRESHOLDS, Operation, State
from .optional import absent, optional_peers
from .peers import peers
from .shapes import Shape

RESULTS = Path(__file__).parents[1] / "results"
#: On the CPU nothing is bigger: 32 Mi elements, 256 MiB of moments.
CPU_ELEMENTS = 2**25
GPU_ELEMENTS = 10**9
#: What torch.quantile took before torch 2.15.
QUANTILE_ELEMENTS = 16_000_000
QUICK_ELEMENTS = 2**20


def main() -> int:
    """Measure, print, write; 0 if ours was measured everywhere."""
    args = _arguments()
    if args.render:
        result = json.loads(args.render.read_text())
        args.render.with_suffix(".md").write_text(report.markdown(result))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    begin, (others, all_) = time.monotonic(), busy_elsewhere()
    result = _measure(args)
    others_after, all_after = busy_elsewhere()
    share = 100 * (others_after - others) / max(all_after - all_, 1e-9)
    result["environment"]["CPU time of other processes"] = f"{share:.1f}%"
    result["environment"]["seconds in all"] = round(time.monotonic() - begin)
    print(report.terminal_targets(result))
    if args.out:
        print("wrote", _write(result, args.out))
    failed = [r for g in result["groups"] for r in g["rows"] if r["reason"] and "ours" in r["name"]]
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel", description=__doc__)
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--seed", type=int, default=1234)
    add("--rounds", type=int, help="default 9, with --quick 3")
    add("--round-seconds", type=float, help="of each implementation in a round (default 0.02)")
    add("--max-elements", type=int, help="cut shapes to so many (default: CPU 2**25, GPU none)")
    add("--compile", action="store_true", help="measure torch.compile too; compiling takes minutes")
    add("--operations", nargs="*", metavar="PART", help="only those with this in their name")
    add("--shapes", nargs="*", metavar="PART", help="only those with this in their name")
    add("--quick", action="store_true", help="small and few; writes nothing without --out")
    add("--out", type=Path, help="directory for the result (default benchmarks/results)")
    add("--render", type=Path, metavar="JSON", help="only write the markdown of a result again")
    args = parser.parse_args()
    args.rounds = args.rounds or (3 if args.quick else 9)
    if args.round_seconds is None:
        args.round_seconds = 0.002 if args.quick else 0.02
    if args.max_elements is None:
        args.max_elements = QUICK_ELEMENTS if args.quick else None
        if args.max_elements is None and args.device == "cpu":
            args.max_elements = CPU_ELEMENTS
    if args.out is None and not args.quick:
        args.out = RESULTS
    return args


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    todo = [s for s in _shapes(args) if _wanted(s.name, args.shapes)]
    operations = [o for o in OPERATIONS if _wanted(o.name, args.operations)]
    result: dict[str, Any] = {
        "schema": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": args.device,
        "environment": environment(args.device),
        "settings": _settings(args),
        "absent": absent(args.device, args.compile),
        "shapes": [_described(s) for s in todo],
        "groups": [],
    }
    for shape in todo:
        state = State.make(shape.sizes, args.device, args.seed, shape.dtype)
        is_fp32 = shape.dtype == "float32"
        for operation in operations:
            if not _fits(operation, shape):
                continue
            candidates = [
                *peers(operation, args.device, shape.dtype),
                *(optional_peers(operation, args.device, args.compile) if is_fp32 else ()),
            ]
            rows = measure(operation, state, candidates, args.rounds, args.round_seconds)
            group = {
                "operation": operation.name,
                "shape": shape.name,
                "elements": shape.elements,
                "rows": [asdict(row) for row in rows],
            }
            result["groups"].append(group)
            print(report.terminal(group), flush=True)
        del state
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return result


def _shapes(args: argparse.Namespace) -> list[Shape]:
    most = args.max_elements
    huge = CPU_ELEMENTS if args.device == "cpu" else GPU_ELEMENTS
    tensor = shapes.huge_tensor(huge)
    whole = [
        tensor,
        *(shapes.in_dtype(tensor, dtype) for dtype in ("bfloat16", "float16")),
        shapes.single_tensor(QUANTILE_ELEMENTS),
        shapes.small_tensors(),
        shapes.llama_3_8b(),
        shapes.llama_3_70b(),
        shapes.deepseek_v3(),
    ]
    return [shapes.cut(shape, most) for shape in whole]


def _fits(operation: Operation, shape: Shape) -> bool:
    """The thresholds want one tensor, and only they want the one that is not huge.

    torch's composition of the batch-size rule rounds each of its passes in 16 bits, and master
    weights are fp32.
    """
    if operation.kind == THRESHOLDS:
        return len(shape.sizes) == 1 and shape.dtype == "float32"
    if operation.kind in (BATCH_SIZE, COMPARE) and shape.dtype != "float32":
        return False
    return len(shape.sizes) > 1 or shape.name.startswith(shapes.HUGE_TENSOR)


def _wanted(name: str, parts: list[str] | None) -> bool:
    return parts is None or any(part.lower() in name.lower() for part in parts)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("rounds", "round_seconds", "max_elements", "seed", "compile", "quick")
    out = {name.replace("_", " "): getattr(args, name) for name in names}
    return out | {"operations": args.operations, "shapes": args.shapes}


def _described(shape: Shape) -> dict[str, Any]:
    return {
        "name": shape.name,
        "layout": shape.layout,
        "source": shape.source,
        "tensors": len(shape.sizes),
        "elements": shape.elements,
        "whole": shape.whole,
        "dtype": shape.dtype,
        "single": len(shape.sizes) == 1,
        "largest": max(shape.sizes),
        "smallest": min(shape.sizes),
    }


def _write(result: dict[str, Any], out: Path) -> str:
    out.mkdir(parents=True, exist_ok=True)
    model = result["environment"].get("GPU", result["environment"]["CPU"])
    quick = "-quick" if result["settings"]["quick"] else ""
    stem = f"{result['date']}-{result['device']}-{slug(model)}{quick}"
    result["file"] = f"{stem}.json"
    (out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{stem}.md").write_text(report.markdown(result))
    return f"{stem}.json and {stem}.md"


if __name__ == "__main__":
    sys.exit(main())
