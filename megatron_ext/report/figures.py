"""Figures, made by matplotlib without a display and without its global state.

matplotlib is imported where a figure is made: everything else works without it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PolicyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .curves import Curve

#: Okabe and Ito's palette, told apart with any colour vision; dark enough on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
#: Phase 1 is dashed and thin, phase 2 solid and thick: told apart without colours.
_LINES: tuple[dict[str, Any], dict[str, Any]] = (
    {"linestyle": (0, (4, 2)), "linewidth": 1.4, "alpha": 0.85},
    {"linestyle": "-", "linewidth": 2.4},
)
#: Groups beyond it are drawn, and left out of the legend.
_LEGEND = 12
_FORMATS = (".png", ".svg")


def curves_figure(curves: Sequence[Curve]) -> Figure:
    """Learning rate above weight decay, over iterations; the old phase dashed, the new one solid.

    Args:
        curves: Of one phase or two. Groups with the same values are drawn as one line. Where the
            new phase counts its iterations from another number, it is drawn where the old one ends.

    Returns:
        A figure for `save` or `svg`, 900 pixels wide at the resolution of `save`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    ends = [c.iterations[-1] for c in curves if c.phase == 1]
    starts = [c.iterations[0] for c in curves if c.phase == 2]
    shift = max(ends) - min(starts) if ends and starts else 0
    for axes, values, name in (
        (above, "lr", "learning rate"),
        (below, "weight_decay", "weight decay"),
    ):
        _draw(axes, curves, values, shift)
        axes.set_ylabel(name)
        if starts:
            axes.axvline(min(starts) + shift, color="black", linewidth=1, linestyle=":")
    below.set_xlabel("iteration" if not shift else "iteration, of both phases together")
    if starts:
        above.annotate(
            f"new phase, from iteration {min(starts)}",
            (min(starts) + shift, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(5, 0),
            textcoords="offset points",
            verticalalignment="top",
            fontsize=9,
        )
    return figure


def _draw(axes: Any, curves: Sequence[Curve], values: str, shift: int) -> None:
    """One quantity of all curves, each line with what it stands for above the axes."""
    from matplotlib.ticker import FuncFormatter

    colours: dict[tuple[int, int], str] = {}
    for number, (name, curve) in enumerate(_distinct(curves, values)):
        key = curve.optimizer, curve.group
        colour = colours.setdefault(key, _COLOURS[len(colours) % len(_COLOURS)])
        style = {**_LINES[curve.phase != 1], "color": colour}
        x = [i + (shift if curve.phase == 2 else 0) for i in curve.iterations]
        label = plain_text(name) if number < _LEGEND else "_"
        axes.plot(x, getattr(curve, values), label=label, **style)
    top = max((max(getattr(c, values)) for c in curves), default=0.0) or 1.0
    axes.set_ylim(-0.04 * top, 1.12 * top)
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if axes.get_legend_handles_labels()[1]:
        place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
        axes.legend(**place, ncols=2, fontsize=9, frameon=False, handlelength=3)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure as its file's suffix says.

    Args:
        figure: What `curves_figure` gave.
        path: Ends in ``.png`` or ``.svg``.

    Raises:
        PolicyError: Another suffix.
        OSError: The file cannot be written.
    """
    require_format(path)
    if Path(path).suffix.lower() == ".svg":
        Path(path).write_text(svg(figure), encoding="utf-8")
    else:
        figure.savefig(path, format="png", dpi=100, metadata={"Software": None})


def require_format(path: str | Path) -> None:
    """Raise if a figure cannot be written into such a file.

    Args:
        path: The file, as ``--plot`` names it.

    Raises:
        PolicyError: It ends in neither ``.png`` nor ``.svg``.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in _FORMATS:
        raise PolicyError(
            f"--plot {path}: expected a file that ends in .png or .svg, found "
            f"{suffix or 'no suffix'}. Give it another name"
        )


def svg(figure: Figure) -> str:
    """A figure as one SVG element: no scripts, no links to files, the same text every time.

    Args:
        figure: What `curves_figure` gave.
    """
    import matplotlib

    file = io.StringIO()
    # Text as outlines needs no font where it is read; the salt names the elements by their content.
    with matplotlib.rc_context({"svg.hashsalt": "megatron_ext", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]  # the doctype before it names a file of the W3C


def plain_text(text: str) -> str:
    r"""Text that matplotlib shows as it is: no formula between two ``$``, no control characters.

    Args:
        text: Of a checkpoint, perhaps.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.replace("$", r"\$")


def _distinct(curves: Sequence[Curve], values: str) -> list[tuple[str, Curve]]:
    """Each line once, with what it stands for."""
    same: dict[tuple[Any, ...], list[Curve]] = {}
    for curve in curves:
        points = curve.iterations, getattr(curve, values)
        same.setdefault((curve.phase, curve.label, *points), []).append(curve)
    return [(_name(alike, curves), alike[0]) for alike in same.values()]


def _name(alike: Sequence[Curve], curves: Sequence[Curve]) -> str:
    one = alike[0]
    phase = [c for c in curves if (c.phase, c.label) == (one.phase, one.label)]
    if len(alike) == len(phase):
        return f"{one.label}: all groups"
    chained = any(c.optimizer for c in phase)
    named = [f"{c.optimizer}.{c.group}" if chained else str(c.group) for c in alike]
    shown = ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
    return f"{one.label}: group{'s' if len(named) > 1 else ''} {shown}"
