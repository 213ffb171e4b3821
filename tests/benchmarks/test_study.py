"""The numbers of the training study, from losses made by hand."""

from __future__ import annotations

import pytest

from benchmarks.transition.report import markdown
from benchmarks.transition.runs import LARGER_BATCH, SAME_BATCH, VARIANTS, Size
from benchmarks.transition.summary import EARLY, LAST, Spread, averaged, summarise

LENGTH = EARLY + LAST


def test_a_rise_that_goes_away_is_early_and_not_late() -> None:
    baseline = {1: [2.0] * LENGTH, 2: [2.1] * LENGTH}
    bump = [0.5] * 10 + [0.0] * (LENGTH - 10)
    found = summarise(
        {s: [a + b for a, b in zip(x, bump, strict=True)] for s, x in baseline.items()}, baseline
    )
    assert found.rise.mean == pytest.approx(0.5)
    assert found.early.mean == pytest.approx(0.5 * 10 / EARLY)
    assert found.late == Spread(0.0, 0.0)
    assert not found.late.is_told_apart
    assert found.behind.mean == pytest.approx(14)


def test_the_first_loss_is_the_same_and_does_not_count_as_caught_up() -> None:
    """The update after the change shows in the second loss."""
    baseline = {1: [2.0] * LENGTH}
    bump = [0.0] + [0.5] * 10 + [0.0] * (LENGTH - 11)
    found = summarise({1: [2.0 + b for b in bump]}, baseline)
    assert found.behind.mean == pytest.approx(15)


def test_a_difference_is_told_apart_if_no_seed_has_the_other_sign() -> None:
    baseline = {1: [2.0] * LENGTH, 2: [2.0] * LENGTH}
    lower = summarise({1: [1.9] * LENGTH, 2: [1.8] * LENGTH}, baseline)
    assert lower.late.mean == pytest.approx(-0.15)
    assert lower.late.is_told_apart
    assert lower.behind.mean == 0
    mixed = summarise({1: [1.9] * LENGTH, 2: [2.2] * LENGTH}, baseline)
    assert not mixed.late.is_told_apart


def test_averages_are_of_the_last_values() -> None:
    assert averaged([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]


def test_every_variant_is_in_the_report_and_has_a_baseline() -> None:
    losses = {v.name: {7: [2.0 + i / 10] * LENGTH} for i, v in enumerate(VARIANTS)}
    text = markdown({"date": "d"}, Size(), [3.0] * 20, losses, "x.png")
    for variant in VARIANTS:
        assert variant.baseline in (SAME_BATCH, LARGER_BATCH)
        assert f"- {variant.name}: `{variant.arguments}`" in text
    assert "| reset | keep | +0.1000 +- 0.0000 |" in text
    assert "What this does not show" in text
