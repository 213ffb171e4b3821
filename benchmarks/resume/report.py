"""The results as JSON, Markdown and pictures."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .cases import COLD, RESCALE, RESET, RESET_COLD, STOCK, STOCK_COLD, VARIANTS, Case
from .model import Cluster, Fit, Prediction, Reader, fit, predict
from .summary import LOAD, load_peak, load_seconds, median, of, verdicts

#: Okabe and Ito's palette, told apart with any colour vision.
_COLOURS = {"sharded_state_dict": "#999999", "read": "#0072B2", "load_state_dict": "#E69F00"}
_PARTS = ("build", *LOAD, "first step")

DOES_NOT_SHOW = (
    "Files on one local disk, or in its cache: a parallel file system has other latencies, and "
    "thousands of readers.",
    "Gloo on CPU cores where there is no GPU: collectives and copies to a device cost something "
    "else there.",
    "Predictions are arithmetic with the assumptions beside them, not measurements.",
)


def write(directory: Path, stem: str, content: Mapping[str, Any]) -> list[Path]:
    """Write all files; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / f"{stem}.{ending}" for ending in ("json", "md", "png")]
    files[0].write_text(json.dumps(content) + "\n")
    picture(files[2], content)
    files[1].write_text(markdown(content, files[2].name))
    return files


def series_of(content: Mapping[str, Any]) -> list[tuple[Case, Mapping[str, Any]]]:
    """The series of a result."""
    return [(Case(**entry["case"]), entry) for entry in content["series"]]


def markdown(content: Mapping[str, Any], image: str) -> str:
    """The tables, and what they do not show."""
    return "\n".join(
        [
            "# What a resume costs",
            "",
            "`python -m benchmarks.resume`. Every sample: the JSON beside this file. Each variant "
            "was measured in turn with the others; a ratio is the median over the repeats of the "
            "ratio within a repeat, with its bootstrap 95% interval, and meets a target if the "
            "interval reaches it. Every resume was compared with the state it should give, bit for "
            "bit.",
            "",
            *(f"- {key}: {value}" for key, value in content["facts"].items()),
            *(f"- FAILED, not in the tables: {name}" for name in content["failed"]),
            "",
            f"![seconds of the parts of a load]({image})",
            "",
            "## Targets",
            "",
            "| figure | found | target | verdict |",
            "|---|---|---|---|",
            *(
                f"| {v.figure} | {v.found} | {v.target} | {v.verdict} |"
                for case, result in series_of(content)
                for v in verdicts(case, result, content["device"])
            ),
            *_scale(content["scale"]),
            *(line for case, result in series_of(content) for line in _table(case, result)),
            *_model(content),
            "",
            "## What this does not show",
            "",
            *(f"- {line}" for line in DOES_NOT_SHOW),
            "",
        ]
    )


def _table(case: Case, result: Mapping[str, Any]) -> Iterator[str]:
    samples, parameters = result["samples"], result["parameters"]
    yield from (
        "",
        f"## {case}",
        "",
        f"{parameters:,} parameters, {case.repeats} repeats. Medians, with half the distance "
        "between the quartiles. Peak: largest memory of the load above what was held before "
        "the optimizer was built, in runs of their own in which malloc keeps no freed memory. "
        "Collectives of the load: calls, and bytes that a rank puts in.",
        "",
        "| resume | "
        + " | ".join(f"{p}, ms" for p in _PARTS)
        + " | of it transform, ms | load, ms "
        "| peak, bytes/parameter | tensors read, bytes/parameter | from storage | collectives |",
        "|---|" + "---|" * (len(_PARTS) + 6),
    )
    for variant in VARIANTS:
        mine = of(samples, variant.name)
        cells = [_spread([s["seconds"].get(p, 0.0) for s in mine]) for p in _PARTS]
        transform = [s["seconds"].get("transform", 0.0) for s in mine]
        cells.append(_spread(transform) if any(transform) else "-")
        cells.append(_spread(list(map(load_seconds, mine))))
        cells.append(f"{median(result['memory'], variant.name, load_peak) / parameters:.2f}")
        cells += [
            f"{median(samples, variant.name, lambda s, k=k: s[k]) / parameters:.2f}"
            for k in ("payload", "stored")
        ]
        cells.append(_collectives(result["collectives"][variant.name.removesuffix(COLD)]))
        yield f"| {variant.name} | " + " | ".join(cells) + " |"


def _spread(seconds: list[float]) -> str:
    if len(seconds) < 4:
        return f"{statistics.median(seconds) * 1e3:.1f}"
    low, middle, high = statistics.quantiles(seconds, n=4)
    return f"{middle * 1e3:.1f} +- {(high - low) / 2 * 1e3:.1f}"


def _collectives(by_part: Mapping[str, Mapping[str, tuple[int, int]]]) -> str:
    total: dict[str, tuple[int, int]] = {}
    for part in LOAD:
        for name, (calls, size) in by_part.get(part, {}).items():
            before = total.get(name, (0, 0))
            total[name] = (before[0] + calls, before[1] + size)
    return ", ".join(f"{n} {c}x {b} B" for n, (c, b) in sorted(total.items())) or "none"


def _scale(scale: Mapping[str, Any]) -> list[str]:
    fits = scale["seconds"] <= 2 and scale["bytes"] <= 500e6
    exact = scale["planned"] == scale["parameters"]
    twice = scale["of experts, twice as many"] == 2 * scale["of experts"]
    known = scale["of experts"] == scale["of experts, closed form"]
    what = f"one rank of {scale['ranks']:,}, {scale['parameters']:,} parameters"
    return [
        f"| plan and merge, {what} | {scale['seconds']:.3f} s, {scale['bytes'] / 1e6:.1f} MB | "
        f"<= 2 s, <= 500 MB | {_met(fits)} |",
        f"| elements that the plans of all ranks cover | {scale['planned']:,} | "
        f"{scale['parameters']:,} | {_met(exact and known)} |",
        f"| of them experts', with twice as many experts | "
        f"{scale['of experts, twice as many']:,} | {2 * scale['of experts']:,} | {_met(twice)} |",
        f"| agreement, bytes a rank | {scale['agreement']} | whatever the ranks | - |",
    ]


def _met(condition: bool) -> str:
    return "met" if condition else "missed"


def fitted(content: Mapping[str, Any]) -> Fit | None:
    """The model's constants, from the format that was measured at most sizes on one rank."""
    chosen = [
        (case, result)
        for case, result in series_of(content)
        if (case.format, case.ranks, case.dtype) == ("dp_reshardable", 1, "bf16")
    ]
    return fit(chosen) if len({case.size for case, _ in chosen}) > 1 else None


def predictions() -> list[Prediction]:
    """Models and clusters that a user might ask about."""
    sizes = ((70e9, 1024), (1e12, 1024), (1e12, 16384))
    return [predict(parameters, Cluster(gpus)) for parameters, gpus in sizes]


def _model(content: Mapping[str, Any]) -> list[str]:
    found = fitted(content)
    out = [
        "",
        "## A model of resume time",
        "",
        "t = c L + R / B_r + T / B_t, with L the model's layers, R the bytes a rank reads from its "
        "files, which are in the page cache, and T those that its passes over the moments move in "
        "memory: none in stock; reading them once, for NaN and the norms; reading and writing them "
        "for a rescale; writing them twice, zeros and the fill, and reading them, for a reset.",
    ]
    if found is not None:
        out += [
            "",
            f"Fitted to this run: {_constants('stock', found.stock)}; "
            f"{_constants('ours', found.ours)}; B_t = {found.moved / 1e9:.2f} GB/s.",
            "",
            "| point | measured, ms | model, ms | error |",
            "|---|---|---|---|",
            *(
                f"| {name} | {m * 1e3:.0f} | {p * 1e3:.0f} | {p / m - 1:+.0%} |"
                for name, m, p in found.residuals
            ),
        ]
    cluster = Cluster(1)
    return [
        *out,
        "",
        f"Predicted, assuming {cluster.storage / 1e9:.0f} GB/s from storage for all GPUs together, "
        f"{cluster.memory / 1e12:.2f} TB/s of a GPU's memory for the op, and {cluster.fixed:g} s "
        "that do not grow:",
        "",
        "| parameters | GPUs | read all, s | without the moments, s | transform, s | its share |",
        "|---|---|---|---|---|---|",
        *(
            f"| {p.parameters:.0e} | {p.cluster.gpus:,} | {p.read_keep:.1f} | {p.read_reset:.1f} | "
            f"{p.transform:.4f} | {p.share:.4%} |"
            for p in predictions()
        ),
    ]


def _constants(name: str, reader: Reader) -> str:
    return f"{name}, c = {reader.layer * 1e3:.1f} ms, B_r = {reader.read / 1e9:.2f} GB/s"


def picture(file: Path, content: Mapping[str, Any]) -> None:
    """The parts of a load for each variant of each series."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series = series_of(content)
    rows = -(-len(series) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(12, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(series) :]:
        axis.set_visible(False)
    names = [v.name for v in VARIANTS]
    for axis, (case, result) in zip(axes.flat, series, strict=False):
        left = [0.0] * len(names)
        for part in LOAD:
            width = [
                median(result["samples"], n, lambda s, p=part: s["seconds"].get(p, 0.0)) * 1e3
                for n in names
            ]
            axis.barh(names, width, left=left, color=_COLOURS[part], label=part)
            left = [a + b for a, b in zip(left, width, strict=True)]
        axis.invert_yaxis()
        axis.set_title(str(case), fontsize=10)
        axis.set_xlabel("ms")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(LOAD))
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def figures(content: Mapping[str, Any]) -> list[str]:
    """What docs/performance.md says, from a result."""
    lines = []
    for case, result in series_of(content):
        samples = result["samples"]
        if (case.ranks, case.dtype) != (1, "bf16") or case.repeats < 20:
            continue
        ms = {n: median(samples, n, load_seconds) * 1e3 for n in (STOCK, RESCALE, RESET)}
        cold = median(samples, RESET_COLD, load_seconds) / median(samples, STOCK_COLD, load_seconds)
        found = {v.figure.rpartition(": ")[2]: v.found for v in verdicts(case, result, "cpu")}
        read = [
            median(samples, n, lambda s: s["payload"]) / result["parameters"]
            for n in (STOCK, RESET)
        ]
        lines.append(
            f"| {case.format}, {case.size}M | {ms[STOCK]:.0f} ms | {found['keep / stock, load']} | "
            f"{found['keep / stock, peak memory of the load']} | "
            f"{found['rescale / keep, load']} | {read[0]:.0f} -> {read[1]:.0f} | {cold:.2f} |"
        )
    return [
        "| checkpoint | stock load | ours / stock | peak memory, ours / stock | rescale / keep | "
        "bytes read a parameter, stock -> reset | time of a reset / stock, cold |",
        "|---|---|---|---|---|---|---|",
        *lines,
    ]
