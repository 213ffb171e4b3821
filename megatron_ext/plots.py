"""Figures, made by matplotlib without a display and without its global state.

matplotlib is imported where a figure is made: everything else works without it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import PolicyError

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
#: With more groups than that the last ones have lines of one width.
_WIDENED = 4
#: Groups beyond it are drawn, and left out of the legend.
_LEGEND = 12
_FORMATS = (".png", ".svg")


def curves_figure(curves: Sequence[Curve]) -> Figure:
    """Learning rate above weight decay, over iterations; the old phase dashed, the new one solid.

    Args:
        curves: Of one phase or two. Groups with the same points are drawn once. Where the new
            phase counts its iterations from another number, it is drawn where the old one ends.

    Returns:
        A figure for `save` or `svg`, 900 pixels wide at the resolution of `save`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), dpi=100, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    lines = _distinct(curves)
    ends = [c.iterations[-1] for _, c in lines if c.phase == 1]
    starts = [c.iterations[0] for _, c in lines if c.phase == 2]
    shift = max(ends) - min(starts) if ends and starts else 0
    keys = list(dict.fromkeys((c.optimizer, c.group) for _, c in lines))
    for number, (name, curve) in enumerate(lines):
        place = keys.index((curve.optimizer, curve.group))
        style = {**_LINES[curve.phase != 1], "color": _COLOURS[place % len(_COLOURS)]}
        # Groups often differ in one of the two only: what lies below looks out on both sides.
        style["linewidth"] += 1.8 * max(0, min(len(keys), _WIDENED) - 1 - place)
        x = [i + (shift if curve.phase == 2 else 0) for i in curve.iterations]
        label = name if number < _LEGEND else "_" + name
        above.plot(x, curve.lr, label=plain_text(label), **style)
        below.plot(x, curve.weight_decay, **style)
    above.set_ylabel("learning rate")
    below.set_ylabel("weight decay")
    below.set_xlabel("iteration" if not shift else "iteration, of both phases together")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.ticklabel_format(axis="x", style="plain", useOffset=False)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useOffset=False)
        if starts:
            axes.axvline(min(starts) + shift, color="black", linewidth=1, linestyle=":")
    if starts:
        above.annotate(
            f"new phase, from iteration {min(starts)}",
            (min(starts) + shift, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=9,
        )
    if lines:
        figure.legend(
            *above.get_legend_handles_labels(), loc="outside right upper", fontsize=9, frameon=False
        )
    return figure


def save(figure: Figure, path: str | Path, flag: str = "--plot") -> None:
    """Write a figure as its file's suffix says.

    Args:
        figure: What `curves_figure` gave.
        path: Ends in ``.png`` or ``.svg``.
        flag: That named the file, for the message.

    Raises:
        PolicyError: Another suffix.
        OSError: The file cannot be written.
    """
    require_format(path, flag)
    if Path(path).suffix.lower() == ".svg":
        Path(path).write_text(svg(figure), encoding="utf-8")
    else:
        figure.savefig(path, format="png", dpi=100, metadata={"Software": None})


def require_format(path: str | Path, flag: str = "--plot") -> None:
    """Raise if a figure cannot be written into such a file.

    Args:
        path: The file.
        flag: That named it, for the message.

    Raises:
        PolicyError: It ends in neither ``.png`` nor ``.svg``.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in _FORMATS:
        raise PolicyError(
            f"{flag} {path}: expected a file that ends in .png or .svg, found "
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


def _distinct(curves: Sequence[Curve]) -> list[tuple[str, Curve]]:
    """Each curve once, with what it stands for."""
    chained = any(c.optimizer for c in curves)
    same: dict[tuple[Any, ...], list[Curve]] = {}
    for curve in curves:
        points = curve.iterations, curve.lr, curve.weight_decay
        same.setdefault((curve.phase, curve.label, *points), []).append(curve)
    return [(_name(group, chained), group[0]) for group in same.values()]


def _name(curves: Sequence[Curve], chained: bool) -> str:
    named = [f"{c.optimizer}.{c.group}" if chained else str(c.group) for c in curves]
    shown = ", ".join(named[:4]) + (f" and {len(named) - 4} more" if len(named) > 4 else "")
    return f"{curves[0].label}: group{'s' if len(named) > 1 else ''} {shown}"
