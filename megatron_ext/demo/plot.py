"""Plot the learning rate of resumed runs, and how far their loss is from ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .runs import Run

#: Okabe and Ito's palette, distinguishable with any colour vision.
_OTHER, _OURS, _FIRST = "#D55E00", "#009E73", "#555555"
_SMOOTHING = 10
#: Iterations of phase 1 that are shown.
_BEFORE = 50


def curves(first: Run, columns: Mapping[str, tuple[Run, Run]], file: Path) -> None:
    """Draw a column for each pair of runs, from shortly before the checkpoint on.

    Both runs of a pair draw the same batches, so that the noise of the batches is not in the
    difference of their losses.

    Args:
        first: Phase 1.
        columns: Title -> another run, and ours with the same arguments.
        file: The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, grid = plt.subplots(
        2, len(columns), figsize=(5 * len(columns), 5.5), squeeze=False, layout="constrained"
    )
    end = first.points[-1].iteration
    for (title, (other, ours)), (top, bottom) in zip(columns.items(), grid.T, strict=True):
        before = first.points[-_BEFORE:]
        top.plot([p.iteration for p in before], [p.lr for p in before], color=_FIRST, lw=2)
        losses = {p.iteration: p.loss for p in ours.points}
        for run, colour, line in ((other, _OTHER, "-"), (ours, _OURS, (0, (4, 2)))):
            x = [p.iteration for p in run.points]
            top.plot(x, [p.lr for p in run.points], color=colour, lw=2, ls=line)
            apart = [p.loss - losses[p.iteration] for p in run.points]
            bottom.plot(x, _smooth(apart), color=colour, lw=2, ls=line, label=run.name)
            first_lr, up = run.points[0].lr, 6 if run is other else -14
            top.annotate(f"{first_lr:.3g}", (x[0], first_lr), (5, up), textcoords="offset points")
        for axes in (top, bottom):
            axes.axvline(end + 0.5, color="black", lw=0.8, ls=(0, (2, 3)))
            axes.grid(alpha=0.25)
            axes.set_xlim(before[0].iteration, ours.points[-1].iteration)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        top.set_title(title, fontsize=10)
        top.set_ylim(0, 1.25 * first.points[-1].lr)
        bottom.margins(y=0.45)
        bottom.legend(fontsize=9, loc="upper right")
        bottom.set_xlabel(f"iteration (loss: mean of {_SMOOTHING})")
    grid[0][0].set_ylabel("learning rate")
    grid[1][0].set_ylabel("loss above SelectiveAdam's,\nnats per byte")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _smooth(values: list[float]) -> list[float]:
    """Average over the last few values, fewer at the start."""
    windows = [values[max(0, i - _SMOOTHING + 1) : i + 1] for i in range(len(values))]
    return [sum(w) / len(w) for w in windows]
