"""The report: markdown from a result, and the lines on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .operations import THRESHOLDS
from .peers import OURS
from .targets import median, pick, traffic, verdicts

_HEAD = ("shape", "implementation", "B", "median", "min", "GB/s", "predicted", "measured")
_CUDA_HEAD = ("host", "temporaries")

_METHOD = """\
- Times are of one call; `median` and `min` are over the rounds. In a round every implementation of
  a group is called in turn, so that a change of the machine's speed meets all of them. What takes
  less than a round's time is called once before it is timed, and finds the caches as it left them.
- `B`: bytes that have to move for one element of exp_avg and one of exp_avg_sq (of exp_avg alone
  for the thresholds and the comparison), counted from the passes that the implementation makes
  (below). Caches are not counted, nor is what a temporary costs beyond its reads and writes.
  `GB/s`: that over the median.
- `predicted` is the implementation's bytes over ours, `measured` its median time over ours: above 1
  ours is faster. A limit does other work on two tensors as long as exp_avg in all.
- Before anything is timed, every implementation but the limits is compared with the reference
  kernel on small tensors: moments to 1e-5, statistics to 1e-4 relative. One that differs is not
  timed.
- Statistics are per tensor: sum of squares before and after, largest magnitude, values that are not
  finite, changed elements. Ours adds the squares in fp64; torch's norms add in fp32. The foreach
  composition of the rescale leaves out the changed elements: it would need a copy of the old
  moments. `foreach` looks for values that are not finite in every tensor; `foreach, shortcut` only
  if the largest magnitudes, which it reads back, are not all finite: the cheapest in plain torch
  that still finds them.
- The foreach composition of the batch-size rule is folded into five passes and one temporary list:
  G = clip(A m^2 - B v, 0, v), v' = G + (v - G)/k.
- Successive calls use a factor of 1.0001 and its inverse, so that nothing grows or vanishes.
"""


def markdown(result: dict[str, Any]) -> str:
    """The report of a result."""
    lines = [
        f"# Moment ops on {result['environment'].get('GPU', result['environment']['CPU'])}",
        "",
        f"`python -m benchmarks.kernel`, {result['date']}. Raw rounds: `{result['file']}`.",
        "",
        "## Targets",
        "",
        *_targets(result),
        "",
        "## Setup",
        "",
        *_table(("what", "value"), [(k, _plain(v)) for k, v in result["environment"].items()]),
        "",
        *_table(("setting", "value"), [(k, _plain(v)) for k, v in result["settings"].items()]),
        "",
        *_shapes(result),
        "",
        "## How it is measured",
        "",
        *_METHOD.splitlines(),
    ]
    for operation in dict.fromkeys(group["operation"] for group in result["groups"]):
        lines += [
            "",
            f"## {operation[0].upper()}{operation[1:]}",
            "",
            *_operation(result, operation),
        ]
    lines += ["", "## Not measured", "", *_absent(result), ""]
    return "\n".join(lines)


def terminal(group: dict[str, Any]) -> str:
    """One group, columns aligned."""
    cuda = any(row["host_seconds"] for row in group["rows"])
    rows = [_head(cuda), *(_row(group, row, cuda) for row in group["rows"])]
    rows = [row[1:] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    body = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows]
    title = f"{group['operation']}: {group['shape']}, {group['elements']:,} elements"
    return "\n".join([title, *(f"  {line.rstrip()}" for line in body)])


def terminal_targets(result: dict[str, Any]) -> str:
    """The targets, one a line."""
    return "\n".join(
        f"{v.verdict}: {v.figure}"
        + (f" {v.measured} (predicted {v.predicted}, target {v.target})" if v.ours != "-" else "")
        for v in verdicts(result)
    )


def _targets(result: dict[str, Any]) -> Iterator[str]:
    head = ("figure", "ours", "peer", "predicted ratio", "measured ratio", "target", "verdict")
    rows = [
        (v.figure, v.ours, v.peer, v.predicted, v.measured, v.target, v.verdict)
        for v in verdicts(result)
    ]
    yield from _table(head, rows)


def _shapes(result: dict[str, Any]) -> Iterator[str]:
    rows = []
    for s in result["shapes"]:
        cut = f"cut from {s['whole']:,}" if s["elements"] < s["whole"] else "whole"
        rows.append(
            (s["name"], s["layout"], f"{s['tensors']:,}", f"{s['elements']:,}", cut, s["source"])
        )
    yield from _table(
        ("shape", "one rank of", "tensors", "elements of exp_avg", "size", "source"), rows
    )
    if any(s["elements"] < s["whole"] for s in result["shapes"]):
        yield ""
        yield (
            "A shape that was cut has as many tensors as the whole, each smaller in proportion: "
            "its times are not those of the model."
        )


def _operation(result: dict[str, Any], operation: str) -> Iterator[str]:
    groups = [group for group in result["groups"] if group["operation"] == operation]
    cuda = result["device"] == "cuda"
    rows = [_row(group, row, cuda) for group in groups for row in group["rows"]]
    yield from _table(_head(cuda), rows)
    yield ""
    if operation == THRESHOLDS:
        yield "What the others do, selecting or sorting, does not follow from bytes."
        yield ""
    seen = {row["name"]: row for group in groups for row in group["rows"]}
    for name, row in seen.items():
        terms = " + ".join(f"{what} {n}" for what, n in row["traffic"] or [])
        text = "; ".join(filter(None, (terms, row["note"])))
        if text:
            yield f"- {name}: {text}"
    if cuda and "statistics" in operation:
        yield ""
        yield (
            "Temporaries include the result. Of ours, prepared, it is all there is: 80 bytes a "
            "tensor. The table, which is made once, has 160 bytes a segment, 12 a tensor, and 68 "
            "for every 32,768 elements of a segment."
        )


def _absent(result: dict[str, Any]) -> list[str]:
    lines = [f"- {name}: {why}" for name, why in result["absent"].items()]
    lines += [
        f"- {row['name']}, {group['operation']}, {group['shape']}: {row['reason']}"
        for group in result["groups"]
        for row in group["rows"]
        if row["reason"]
    ]
    return lines or ["- nothing"]


def _head(cuda: bool) -> tuple[str, ...]:
    return _HEAD + (_CUDA_HEAD if cuda else ())


def _row(group: dict[str, Any], row: dict[str, Any], cuda: bool) -> tuple[str, ...]:
    width = len(_head(cuda))
    name = (group["shape"], row["name"])
    if row["reason"]:
        return (*name, f"not measured: {row['reason']}", *("-",) * (width - 3))
    ours, bytes_ = pick(group, OURS), traffic(row)
    seconds = median(row)
    speed = f"{bytes_ * group['elements'] / seconds / 1e9:.1f}" if bytes_ else "-"
    predicted = measured = "-"
    if ours is not None:
        measured = f"{seconds / median(ours):.2f}x"
        if bytes_:
            predicted = f"{bytes_ / (traffic(ours) or 1):.2f}x"
    cells: tuple[str, ...] = (
        *name,
        str(bytes_ or "-"),
        _time(seconds),
        _time(min(row["seconds"])),
        speed,
        predicted,
        measured,
    )
    if cuda:
        hosts = sorted(row["host_seconds"])
        cells += (_time(hosts[len(hosts) // 2]), f"{row['temporaries']:,}")
    return cells


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
