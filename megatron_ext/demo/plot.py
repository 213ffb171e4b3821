"""Plot learning rate and loss of both phases in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .runs import Run

#: Okabe and Ito's palette, distinguishable with any colour vision.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
_SMOOTHING = 10


def curves(first: Run, others: Sequence[Run], file: Path) -> None:
    """Draw phase 1 and every phase 2 that trained.

    Args:
        first: Phase 1.
        others: The runs of phase 2.
        file: The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 7), sharex=True, layout="constrained")
    styles = [("#555555", "-"), *zip(_COLOURS, ("-", "-", "-", "--", ":"), strict=True)]
    for (colour, line), run in zip(styles, [first, *others], strict=False):
        if not run.points:
            top.plot([], [], color=colour, label=f"{run.name}: did not load")
            continue
        x = [p.iteration for p in run.points]
        top.plot(x, [p.lr for p in run.points], line, color=colour, label=run.name, lw=1.8)
        losses = [p.loss for p in run.points]
        bottom.plot(x, losses, line, color=colour, lw=0.5, alpha=0.3)
        bottom.plot(x, _smooth(losses), line, color=colour, lw=1.8)
    for axes in (top, bottom):
        axes.axvline(first.points[-1].iteration + 0.5, color="black", lw=0.8, ls=(0, (2, 3)))
        axes.grid(alpha=0.25)
    top.set_yscale("log")
    top.set_ylabel("learning rate")
    top.set_title("Resumed with a lower learning rate; dotted line: the checkpoint")
    top.legend(fontsize=8)
    bottom.set_ylabel(f"loss, nats per byte (thick: mean of {_SMOOTHING})")
    bottom.set_xlabel("iteration")
    tail = [p.loss for r in others for p in r.points] + [p.loss for p in first.points[-60:]]
    if tail:
        span = max(tail) - min(tail)
        bottom.set_ylim(min(tail) - 0.1 * span, max(tail) + 0.3 * span)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _smooth(values: list[float]) -> list[float]:
    """Average over the last few values, fewer at the start."""
    windows = [values[max(0, i - _SMOOTHING + 1) : i + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]
