"""The results as JSON, Markdown and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .runs import LARGER_BATCH, MODEL, SAME_BATCH, VARIANTS, Size
from .summary import EARLY, LAST, WINDOW, Losses, averaged, summarise

#: Okabe and Ito's palette, told apart with any colour vision.
_COLOURS = ("#000000", "#D55E00", "#009E73", "#0072B2")
_LINES = ("-", "--", "-.", ":")

DOES_NOT_SHOW = (
    "One model of some 130,000 parameters on bytes of source code, one learning rate, one point of "
    "change: nothing here says how large an effect is for a large model, nor that it has the same "
    "sign.",
    "The change comes at a constant learning rate early in training; a change at the end of a "
    "decay, or of the data itself, is another experiment.",
    "The re-warm-up run drops the moments with stock's --no-load-optim, because a schedule cannot "
    "be restarted with a loaded optimizer yet; in its first 50 iterations its learning rate is "
    "lower than the others', so its loss there is no like for like.",
    "Three orders of the data are not a confidence interval: a difference is called told apart if "
    "no seed has the other sign, and nothing more.",
    "The variants with the larger batch see four times the data in an iteration; they are compared "
    "with each other only.",
)

Results = Mapping[str, Mapping[int, Losses]]


def write(
    directory: Path,
    stem: str,
    facts: Mapping[str, Any],
    size: Size,
    first: Losses,
    results: Results,
) -> list[Path]:
    """Write all three files; their paths."""
    files = [directory / f"{stem}.{ending}" for ending in ("json", "md", "png")]
    content = {
        "facts": dict(facts),
        "model": " ".join(MODEL),
        "variants": {v.name: v.arguments for v in VARIANTS},
        "phase 1": list(first),
        "phase 2": {
            name: {str(s): list(x) for s, x in runs.items()} for name, runs in results.items()
        },
    }
    files[0].write_text(json.dumps(content) + "\n")
    files[1].write_text(markdown(facts, size, first, results, files[2].name))
    picture(files[2], first, results)
    return files


def markdown(
    facts: Mapping[str, Any], size: Size, first: Losses, results: Results, image: str
) -> str:
    """The tables, and what they do not show."""
    level = statistics.fmean(first[-20:])
    lines = [
        "# Loss after a phase change",
        "",
        "`python -m benchmarks.transition`. Losses of every run: the JSON beside this file.",
        "",
        *(f"- {key}: {value}" for key, value in facts.items()),
        f"- phase 1: {size.first} iterations, loss {level:.4f} (mean of the last 20)",
        f"- phase 2: {size.second} iterations, seeds {', '.join(map(str, size.seeds))}",
        "",
        f"![losses of all variants]({image})",
        "",
        "Loss above the baseline's with the same data, nats a byte: mean over the seeds +- the "
        f"largest distance of one. Rise: largest in the first {EARLY} iterations, averaged over "
        f"{WINDOW}. Early: mean of these {EARLY}. Late: mean of the last {LAST}. Behind: "
        "iterations until, after the rise, the average is first no longer above; "
        f"{size.second} where it never is.",
        "",
        "| variant | baseline | rise | early | late | behind | late: told apart |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant in VARIANTS:
        if variant.name == variant.baseline:
            continue
        s = summarise(results[variant.name], results[variant.baseline])
        apart = "yes" if s.late.is_told_apart else "no"
        lines.append(
            f"| {variant.name} | {variant.baseline} | {s.rise} | {s.early} | {s.late} | "
            f"{s.behind.mean:.0f} | {apart} |"
        )
    lines += ["", "## Arguments", "", f"All: `{' '.join(MODEL)}`", ""]
    lines += [f"- {v.name}: `{v.arguments}`" for v in VARIANTS]
    lines += ["", "## What this does not show", ""]
    lines += [f"- {text}" for text in DOES_NOT_SHOW]
    return "\n".join(lines) + "\n"


def picture(file: Path, first: Losses, results: Results) -> None:
    """Mean over the seeds of each variant, the span of the seeds shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, both = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axes, baseline in zip(both, (SAME_BATCH, LARGER_BATCH), strict=True):
        names = [v.name for v in VARIANTS if v.baseline == baseline]
        _draw(axes, names, first, results)
        axes.set_title("same batch" if baseline == SAME_BATCH else "global batch size 16 -> 64")
    both[0].set_ylabel(f"loss, nats a byte (mean of {WINDOW} iterations)")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _draw(axes: Any, names: Sequence[str], first: Losses, results: Results) -> None:
    before = averaged(first)[-30:]
    axes.plot(range(-len(before), 0), before, color="#777777", label="phase 1")
    for name, colour, line in zip(names, _COLOURS, _LINES, strict=False):
        runs = [averaged(x) for x in results[name].values()]
        columns = list(zip(*runs, strict=True))
        x = range(len(columns))
        axes.plot(x, [statistics.fmean(c) for c in columns], line, color=colour, label=name)
        axes.fill_between(
            x, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.12, lw=0
        )
    axes.axvline(-0.5, color="black", lw=0.8, ls=(0, (2, 3)))
    axes.set_xlabel("iterations after the change")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)
