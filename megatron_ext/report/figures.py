"""Draw figures with matplotlib, without a display and without its global state.

matplotlib is imported only where a figure is drawn. Everything else works without it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.text import first_of
from ..errors import PolicyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .curves import Curve

#: Okabe and Ito's palette, which is distinct for any colour vision and dark enough on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
#: Phase 1 is dashed and thin, and phase 2 solid and thick, so that they are distinct without
#: colours.
_LINES: tuple[dict[str, Any], dict[str, Any]] = (
    {"linestyle": (0, (4, 2)), "linewidth": 1.4, "alpha": 0.85},
    {"linestyle": "-", "linewidth": 2.4},
)
#: Largest number of lines in the legend. Further lines are drawn without an entry.
_LEGEND = 12
_FORMATS = (".png", ".svg")


def curves_figure(curves: Sequence[Curve]) -> Figure:
    """Draw learning rate and weight decay over iterations, the old phase dashed.

    Args:
        curves: The curves of one phase or two. Groups with the same values are drawn as one line.
            The new phase is drawn from the end of the old one, even if it counts its iterations
            from another number.

    Returns:
        A figure for `save` or `svg`, 900 pixels wide at the resolution of `save`.
    """
    from matplotlib.figure import Figure

    constant = all(len(set(c.weight_decay)) == 1 for c in curves)
    figure = Figure(figsize=(9, 4.2 if constant else 6), dpi=100, layout="constrained")
    ratios = (1,) if constant else (3, 2)
    above, *others = figure.subplots(len(ratios), sharex=True, height_ratios=ratios, squeeze=False)[
        :, 0
    ]
    ends = [c.iterations[-1] for c in curves if c.phase == 1]
    starts = [c.iterations[0] for c in curves if c.phase == 2]
    shift = max(ends) - min(starts) if ends and starts else 0
    drawn = [(above, "lr", "learning rate")]
    drawn += [(below, "weight_decay", "weight decay") for below in others]
    for axes, values, name in drawn:
        _draw(axes, curves, values, shift)
        axes.set_ylabel(name)
        if starts:
            axes.axvline(min(starts) + shift, color="black", linewidth=1, linestyle=":")
    lowest = drawn[-1][0]
    lowest.set_xlabel("iteration" if not shift else "iteration, of both phases together")
    if constant and curves:
        figure.supxlabel(f"weight decay, constant: {_constants(curves)}", fontsize=9)
    if starts:
        at = min(starts) + shift
        left, right = above.get_xlim()
        late = at > (left + right) / 2  # the text is on the side that has room
        above.annotate(
            f"new phase, from iteration {min(starts)}{_jump(curves)}",
            (at, 0.98),
            xycoords=("data", "axes fraction"),
            xytext=(-5 if late else 5, 0),
            textcoords="offset points",
            horizontalalignment="right" if late else "left",
            verticalalignment="top",
            fontsize=9,
        )
    return figure


def _jump(curves: Sequence[Curve]) -> str:
    """Tell the last and the first learning rate where all groups have the same ones."""
    ends = {c.lr[-1] for c in curves if c.phase == 1}
    starts = {c.lr[0] for c in curves if c.phase == 2}
    if len(ends) != 1 or len(starts) != 1:
        return ""
    (old,), (new,) = ends, starts
    return f"\nlearning rate {old:.4g} to {new:.4g}"


def _constants(curves: Sequence[Curve]) -> str:
    """Tell the weight decay of every line, once if it is the same in both phases."""
    phases: dict[str, list[str]] = {}
    for name, curve in _distinct(curves, "weight_decay"):
        groups = name.removeprefix(f"{curve.label}: ")
        phases.setdefault(curve.label, []).append(f"{curve.weight_decay[0]:.4g} ({groups})")
    told = {label: first_of(values) for label, values in phases.items()}
    if len(set(told.values())) == 1:
        return plain_text(next(iter(told.values())))
    return plain_text("; ".join(f"{label} {text}" for label, text in told.items()))


def _draw(axes: Any, curves: Sequence[Curve], values: str, shift: int) -> None:
    """Draw one quantity of all curves, with the legend above the axes."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    colours: dict[tuple[int, int], str] = {}
    for number, (name, curve) in enumerate(_distinct(curves, values)):
        key = curve.optimizer, curve.group
        colour = colours.setdefault(key, _COLOURS[len(colours) % len(_COLOURS)])
        style = {**_LINES[curve.phase != 1], "color": colour}
        x = [i + (shift if curve.phase == 2 else 0) for i in curve.iterations]
        label = plain_text(name) if number < _LEGEND else "_"
        axes.plot(x, getattr(curve, values), label=label, **style)
    top = max((max(getattr(c, values)) for c in curves), default=0.0) or 1.0
    axes.set_ylim(-0.04 * top, 1.2 * top)
    axes.margins(x=0.01)
    axes.grid(alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    if axes.get_legend_handles_labels()[1]:
        place = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "borderaxespad": 0.2}
        axes.legend(**place, ncols=2, fontsize=9, frameon=False, handlelength=3)


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format of the file's suffix.

    Args:
        figure: The result of `curves_figure`.
        path: A file that ends in ``.png`` or ``.svg``.

    Raises:
        PolicyError: The file has another suffix.
        OSError: The file cannot be written.
    """
    require_format(path)
    if Path(path).suffix.lower() == ".svg":
        Path(path).write_text(svg(figure), encoding="utf-8")
    else:
        figure.savefig(path, format="png", dpi=100, metadata={"Software": None})


def require_format(path: str | Path) -> None:
    """Raise unless a file's suffix names a format of figures.

    Args:
        path: The file that ``--plot`` names.

    Raises:
        PolicyError: The file ends in neither ``.png`` nor ``.svg``.
    """
    suffix = Path(path).suffix
    if suffix.lower() not in _FORMATS:
        raise PolicyError(
            f"--plot {path}: expected a file that ends in .png or .svg, found "
            f"{suffix or 'no suffix'}. Give it another name"
        )


def svg(figure: Figure) -> str:
    """Render a figure as one SVG element, without scripts and links, always with the same text.

    Args:
        figure: The result of `curves_figure`.
    """
    import matplotlib

    file = io.StringIO()
    # Outlines need no font where the page is read. With the salt, ids depend only on the content.
    with matplotlib.rc_context({"svg.hashsalt": "megatron_ext", "svg.fonttype": "path"}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]  # the doctype before it links to a file of the W3C


def plain_text(text: str) -> str:
    r"""Escape text that matplotlib would show as a formula (``$``), and control characters.

    Args:
        text: Text that may come from a checkpoint.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown.replace("$", r"\$")


def _distinct(curves: Sequence[Curve], values: str) -> list[tuple[str, Curve]]:
    """List the distinct lines with their names."""
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
