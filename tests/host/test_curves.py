"""Curves of learning rate and weight decay, against formulas by hand, and how they are drawn."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.errors import PlanError, PolicyError
from megatron_ext.host.schedule import ScheduleValues
from megatron_ext.report import figures
from megatron_ext.report.curves import LIMIT, Curve, Span, phase_curves, points

BATCH, WARMUP, DECAY, ANNEAL = 8, 10, 100, 40
MAX, MIN, INIT = 1e-3, 1e-4, 1e-5
VALUES = ScheduleValues(
    max_lr=MAX,
    min_lr=MIN,
    init_lr=INIT,
    lr_warmup_steps=WARMUP * BATCH,
    lr_decay_steps=DECAY * BATCH,
    wd_incr_steps=DECAY * BATCH,
    wsd_decay_steps=ANNEAL * BATCH,
    lr_wsd_decay_style="linear",
)
#: With a weight decay that grows.
GROWING = replace(VALUES, start_wd=0.01, end_wd=0.1, wd_incr_style="linear")
SPAN = Span(0, 120, 0, 120 * BATCH)


def annealed(i: int, form: Callable[[float], float]) -> float:
    """WSD: constant, then `form` of how far its last part has come."""
    done = (i - (DECAY - ANNEAL)) / ANNEAL
    return MAX if done <= 0 else MIN + (MAX - MIN) * form(done)


#: Style -> the rate after the warm-up and before the end of the decay.
RATES: dict[tuple[str, str], Callable[[int], float]] = {
    ("linear", ""): lambda i: MAX + (MIN - MAX) * (i - WARMUP) / (DECAY - WARMUP),
    ("cosine", ""): lambda i: (
        (MAX + MIN) / 2 + (MAX - MIN) / 2 * math.cos(math.pi * (i - WARMUP) / (DECAY - WARMUP))
    ),
    ("constant", ""): lambda i: MAX,
    ("inverse-square-root", ""): lambda i: max(MIN, MAX * math.sqrt(WARMUP / i)),
    ("WSD", "linear"): lambda i: annealed(i, lambda d: 1 - d),
    ("WSD", "cosine"): lambda i: annealed(i, lambda d: (1 + math.cos(math.pi * d)) / 2),
    ("WSD", "exponential"): lambda i: annealed(i, lambda d: 2 * 0.5**d - 1),
    ("WSD", "minus_sqrt"): lambda i: annealed(i, lambda d: 1 - math.sqrt(d)),
}


@pytest.mark.parametrize(("style", "anneal"), RATES)
def test_learning_rates_are_those_of_the_formulas(style: str, anneal: str) -> None:
    values = replace(VALUES, lr_decay_style=style, lr_wsd_decay_style=anneal or None)
    (curve,) = phase_curves("a", 2, values, [[{}]], SPAN)
    assert curve.iterations == tuple(range(121))
    assert curve.samples == tuple(8 * i for i in range(121))
    for i, found in zip(curve.iterations, curve.lr, strict=True):
        if i <= WARMUP:
            expected = INIT + (MAX - INIT) * i / WARMUP
        elif i > DECAY and style != "constant":
            expected = MIN
        else:
            expected = RATES[style, anneal](i)
        assert found == pytest.approx(expected, rel=1e-12), i


@pytest.mark.parametrize(
    ("style", "form"),
    [
        ("linear", lambda share: share),
        ("cosine", lambda share: (1 - math.cos(math.pi * share)) / 2),
    ],
)
def test_weight_decay_grows(style: str, form: Callable[[float], float]) -> None:
    values = replace(VALUES, start_wd=0.01, end_wd=0.11, wd_incr_style=style)
    groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}, {"wd_mult": 0.5}]
    curves = phase_curves("a", 1, values, [groups], SPAN)
    assert [c.group for c in curves] == [0, 1, 2]
    for curve, group in zip(curves, groups, strict=True):
        for i, found in zip(curve.iterations, curve.weight_decay, strict=True):
            whole = 0.01 + 0.1 * form(min(i / DECAY, 1.0))
            assert found == pytest.approx(whole * group["wd_mult"], rel=1e-12)


def test_groups_have_their_own_bounds_and_are_left_alone() -> None:
    groups = [{"max_lr": MAX, "min_lr": MIN}, {"max_lr": 2e-3, "min_lr": 0.0}]
    before = [dict(g) for g in groups]
    curves = phase_curves("a", 2, VALUES, [groups[:1], groups[1:]], SPAN)
    assert groups == before
    assert [(c.optimizer, c.group) for c in curves] == [(0, 0), (1, 0)]
    assert [max(c.lr) for c in curves] == [MAX, 2e-3]
    assert [c.lr[-1] for c in curves] == [MIN, 0.0]


def test_a_phase_begins_where_its_scheduler_is() -> None:
    """Iterations count from 90, the schedule goes on at iteration 40's place."""
    span = Span(90, 110, 40 * BATCH, 60 * BATCH)
    (curve,) = phase_curves("a", 2, VALUES, [[{}]], span)
    whole = phase_curves("a", 2, VALUES, [[{}]], SPAN)[0]
    assert curve.iterations == tuple(range(90, 111))
    assert curve.lr == whole.lr[40:61]


@pytest.mark.parametrize("last", [1, 5, 399, 400, 401, 10**6, 10**9])
def test_the_number_of_points_is_bounded_and_corners_are_among_them(last: int) -> None:
    values = replace(
        VALUES,
        lr_decay_style="WSD",
        lr_warmup_steps=last // 7 * BATCH,
        lr_decay_steps=last // 2 * BATCH,
        wsd_decay_steps=last // 5 * BATCH,
    )
    found = points(values, Span(0, last, 0, last * BATCH))
    assert len(found) <= min(LIMIT, last + 1)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (0, last)
    corners = {last // 7, last // 2, last // 2 - last // 5}
    assert {c for c in corners if 0 < c <= last} <= set(found)


def test_nothing_left_to_train_is_one_point() -> None:
    (curve,) = phase_curves("a", 2, VALUES, [[{}]], Span(10, 10, 80, 80))
    assert (curve.iterations, curve.samples, curve.lr) == ((10,), (80,), (MAX,))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"min_lr": 1.0}, "AssertionError"),
        ({"lr_warmup_steps": 800}, "AssertionError"),
        ({"lr_decay_style": "zigzag"}, "zigzag"),
        ({"start_wd": 0.2}, "AssertionError"),
    ],
)
def test_values_that_megatron_refuses(changes: dict[str, float], expected: str) -> None:
    with pytest.raises(PlanError, match="Megatron's scheduler does not accept") as caught:
        phase_curves("a", 2, replace(VALUES, **changes), [[{}]], SPAN)
    assert expected in str(caught.value)


# --- figures


def two_phases(label: str = "resumed run") -> list[Curve]:
    groups = [{"wd_mult": 1.0}, {"wd_mult": 0.0}]
    old = phase_curves("checkpoint's run", 1, GROWING, [groups], Span(0, 60, 0, 480))
    new = replace(GROWING, max_lr=3e-4, min_lr=3e-5)
    return [*old, *phase_curves(label, 2, new, [groups], Span(0, 60, 480, 960))]


def test_the_phases_differ_in_more_than_colour_and_meet() -> None:
    above, below = figures.curves_figure(two_phases()).axes
    drawn = [[line for line in axes.lines if len(line.get_xdata()) > 2] for axes in (above, below)]
    # Both groups have one learning rate, and a weight decay each.
    assert [[line.get_linestyle() for line in lines] for lines in drawn] == [
        ["--", "-"],
        ["--", "--", "-", "-"],
    ]
    old, other, new, _ = drawn[1]
    assert old.get_linewidth() < new.get_linewidth()
    assert old.get_color() == new.get_color() != other.get_color()
    # Its iterations count from 0 again; it is drawn where the checkpoint's run ends.
    assert [(line.get_xdata()[0], line.get_xdata()[-1]) for line in drawn[0]] == [
        (0, 60),
        (60, 120),
    ]
    for axes in (above, below):
        assert len([line for line in axes.lines if list(line.get_xdata()) == [60, 60]]) == 1
    low, high = below.get_ylim()
    assert low < 0.0 < 0.01 < high  # a weight decay of 0 is seen


def test_the_jump_and_a_constant_weight_decay_are_told_in_words() -> None:
    constant = replace(VALUES, start_wd=0.1, end_wd=0.1, wd_incr_style="constant")
    groups = [[{"wd_mult": 1.0}, {"wd_mult": 0.0}]]
    old = phase_curves("one", 1, constant, groups, Span(0, 6, 0, 48))
    for decay, words in (
        (0.1, "weight decay, constant: 0.1 (group 0), 0 (group 1)"),
        (
            0.05,
            "weight decay, constant: one 0.1 (group 0), 0 (group 1); "
            "two 0.05 (group 0), 0 (group 1)",
        ),
    ):
        later = replace(constant, max_lr=3e-4, min_lr=3e-5, start_wd=decay, end_wd=decay)
        new = phase_curves("two", 2, later, groups, Span(6, 9, 48, 72))
        figure = figures.curves_figure([*old, *new])
        (axes,) = figure.axes
        assert figure.get_supxlabel() == words
        (text,) = axes.texts
        jump = f"learning rate {old[0].lr[-1]:.4g} to {new[0].lr[0]:.4g}"
        assert text.get_text() == f"new phase, from iteration 6\n{jump}"
        assert text.get_horizontalalignment() == "right"  # the new phase is short
        figure.canvas.draw()
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert len(labels) == len(set(labels)) > 3
        assert all(float(tick).is_integer() for tick in axes.get_xticks())


def names(curves: list[Curve]) -> list[list[str]]:
    """What stands above both axes."""
    axes = figures.curves_figure(curves).axes
    return [[t.get_text() for t in one.get_legend().get_texts()] for one in axes]


def test_equal_groups_are_one_line() -> None:
    curves = phase_curves("run", 2, GROWING, [[{}, {"wd_mult": 0.0}], [{}]], SPAN)
    assert names(list(curves)) == [["run: all groups"], ["run: groups 0.0, 1.0", "run: group 0.1"]]
    many = phase_curves("run", 2, GROWING, [[{"max_lr": MAX * (1 + i)} for i in range(40)]], SPAN)
    rates, decays = names(list(many))
    assert (len(rates), rates[11], decays) == (12, "run: group 11", ["run: all groups"])


def test_an_svg_is_the_same_each_time_and_stands_alone() -> None:
    text, other = (figures.svg(figures.curves_figure(two_phases())) for _ in range(2))
    assert text == other
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert "path" in names
    assert not names & {"script", "image", "foreignObject", "a"}
    links = {v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")}
    assert links
    assert all(link.startswith("#") for link in links)


@pytest.mark.parametrize("name", ["a.png", "b.PNG", "c.svg"])
def test_files_are_written_as_their_suffix_says(name: str, tmp_path: Path) -> None:
    figures.save(figures.curves_figure(two_phases()), tmp_path / name)
    data = (tmp_path / name).read_bytes()
    if name.lower().endswith("png"):
        assert data.startswith(b"\x89PNG")
        assert int.from_bytes(data[16:20]) == 900
    else:
        assert data.startswith(b"<svg")


@pytest.mark.parametrize("name", ["a.pdf", "a", "png"])
def test_another_suffix_names_the_flag(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        PolicyError, match=r"--plot .*: expected a file that ends in \.png or \.svg"
    ):
        figures.save(figures.curves_figure(two_phases()), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["$x$", r"\$\alpha$", "$", "a\x1b[31mb", "_hidden", "<b>&"])
def test_a_name_is_shown_as_it_is(name: str) -> None:
    """A formula, an escape or an unbalanced ``$`` would not be drawn, or raise."""
    figure = figures.curves_figure(two_phases(f"run {name}"))
    text = figure.axes[1].get_legend().get_texts()[-1]
    assert text._preprocess_math(text.get_text()) == (
        f"run {name}: group 1".replace("\x1b", "\\x1b"),
        False,
    )
    assert "\x1b" not in figures.svg(figure)
