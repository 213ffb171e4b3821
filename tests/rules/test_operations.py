"""Operations on a moment: read, written, and refused in words that help."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
from hypothesis import given

from megatron_ext.errors import PolicyError
from megatron_ext.rules import GRAMMAR
from megatron_ext.rules.base import Rule
from megatron_ext.rules.batch_size import BatchRatio
from megatron_ext.rules.bias_consistent import BiasConsistent
from megatron_ext.rules.elementwise import KEEP, Fill, Floor, Scale
from megatron_ext.rules.fill_from import FillFrom
from megatron_ext.rules.mean_of import MeanOf
from megatron_ext.rules.prune import Prune, PruneMagnitude, PruneRandom
from megatron_ext.rules.registry import check_moment, parse, write
from tests.support.policy_strategies import OPERATIONS


@given(operation=OPERATIONS)
def test_what_is_written_is_read_back_as_the_same_operation(operation: Rule) -> None:
    assert parse(write(operation)) == operation
    assert type(parse(write(operation))) is type(operation)


@pytest.mark.parametrize(
    ("text", "operation", "written"),
    [
        ("keep", KEEP, "keep"),
        ("reset", Fill(0.0), "reset"),
        ("fill 0", Fill(0.0), "reset"),
        ("scale -2", Scale(-2.0), "scale -2.0"),
        (" scale   1e-3 ", Scale(0.001), "scale 0.001"),
        ("fill .5", Fill(0.5), "fill 0.5"),
        ("fill mean", FillFrom("mean"), "fill mean"),
        ("fill median", FillFrom("median"), "fill median"),
        ("fill column-mean", FillFrom("column-mean"), "fill column-mean"),
        ("fill mean-of *.k_norm.weight", MeanOf("*.k_norm.weight"), "fill mean-of *.k_norm.weight"),
        (" fill  mean-of  re:(a|b)[.]c ", MeanOf("re:(a|b)[.]c"), "fill mean-of re:(a|b)[.]c"),
        ("fill mean-of 7", MeanOf("7"), "fill mean-of 7"),
        ("floor 1E-12", Floor(1e-12), "floor 1e-12"),
        ("prune 0.9", Prune(0.9), "prune 0.9"),
        ("prune-random 0.5", PruneRandom(0.5), "prune-random 0.5"),
        ("prune-random 0.5 seed -7", PruneRandom(0.5, -7), "prune-random 0.5 seed -7"),
        ("batch-size 4", BatchRatio(4.0), "batch-size 4.0"),
        ("bias-consistent", BiasConsistent(), "bias-consistent"),
    ],
)
def test_every_form_is_read(text: str, operation: Rule, written: str) -> None:
    assert parse(text) == operation
    assert write(operation) == written


def test_the_list_of_forms_is_complete() -> None:
    values = {"A": "2", "X": "0.5", "P": "0.5", "K": "4", "PATTERN": "*.bias"}
    for form in GRAMMAR:
        words = [values.get(word, word) for word in form.split(" [")[0].split()]
        assert isinstance(parse(" ".join(words)), Rule)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scal 2", "unknown operation 'scal 2'; did you mean 'scale'? Operations: keep, reset, "),
        ("resett", "did you mean 'reset'?"),
        ("", "unknown operation ''; Operations: keep"),
        ("zero everything", "unknown operation 'zero everything'; Operations: keep"),
        ("keep 2", "'keep 2': expected 'keep'"),
        ("scale", "'scale': expected 'scale A'"),
        ("scale 2 3", "'scale 2 3': expected 'scale A'"),
        ("scale two", "'scale two': expected a number, found 'two'"),
        ("scale 1_000", "expected a number, found '1_000'"),
        ("scale nan", "expected a number, found 'nan'"),
        ("fill inf", "expected a number, found 'inf'"),
        ("scale 1e999", "Scale.factor is inf; it must be a finite number"),
        (
            "fill",
            "'fill': expected 'fill X' or 'fill mean' or 'fill median' or 'fill column-mean'",
        ),
        ("fill row-mean", "'fill row-mean': expected a number, found 'row-mean'"),
        ("fill mean-of", "'fill mean-of': expected 'fill mean-of PATTERN'"),
        ("fill mean-of a b", "'fill mean-of a b': expected 'fill X' or 'fill mean' or "),
        ("fill mean-of re:(", "fill mean-of re:(: not a regular expression: missing )"),
        ("prune 1.5", "prune: expected a fraction from 0 to 1, found 1.5"),
        ("prune -0.1", "prune: expected a fraction from 0 to 1, found -0.1"),
        ("prune-random 2", "PruneRandom.probability is 2.0; it must be between 0 and 1"),
        ("prune-random 0.5 seed", "expected 'prune-random P [seed N]'"),
        ("prune-random 0.5 sed 3", "expected 'prune-random P [seed N]'"),
        ("prune-random 0.5 seed 1.5", "expected an integer, found '1.5'"),
        ("batch-size 0", "batch-size: expected a ratio above 0, found 0.0"),
        ("batch-size -4", "batch-size: expected a ratio above 0, found -4.0"),
        ("batch-size 256 1024", "'batch-size 256 1024': expected 'batch-size K'"),
        ("bias-consistent 2", "'bias-consistent 2': expected 'bias-consistent'"),
    ],
)
def test_what_is_no_operation_is_refused_with_what_was_expected(text: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FillFrom("mode"), "expected a number or one of mean, median, column-mean"),
        (lambda: MeanOf("a b"), "without spaces; found 'a b'"),
        (lambda: MeanOf(""), "fill mean-of: expected a glob, or re: and a regular expression, "),
        (lambda: MeanOf(2.0), "found 2.0"),  # type: ignore[arg-type]
        (lambda: Prune(math.nan), "prune: expected a fraction from 0 to 1, found nan"),
        (lambda: BatchRatio(math.inf), "batch-size: expected a ratio above 0, found inf"),
        (lambda: BatchRatio(math.nan), "batch-size: expected a ratio above 0, found nan"),
    ],
)
def test_an_operation_made_in_python_is_checked_too(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(PolicyError, match=re.escape(message)):
        make()


# --- which operation for which moment


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("exp_avg_sq", "scale -1", "'scale -1.0' would make exp_avg_sq negative"),
        ("exp_avg_sq", "fill -1e-9", "'fill -1e-09' would make exp_avg_sq negative"),
        ("exp_avg_sq", "floor 1e39", "'floor 1e+39': minimum is 1e+39, which fp32 cannot hold"),
        ("exp_avg_sq", "fill 1e39", "'fill 1e+39': value is 1e+39, which fp32 cannot hold"),
        ("exp_avg", "fill -1e39", "'fill -1e+39': value is -1e+39, which fp32 cannot hold"),
        ("exp_avg_sq", "scale 1e39", "'scale 1e+39': factor is 1e+39, which fp32 cannot hold"),
        ("exp_avg", "clip 3.4028236e38", "which fp32 cannot hold (at most 3.4028235e+38)"),
        ("exp_avg_sq", "floor -2", "expected a number of at least 0"),
        ("exp_avg", "batch-size 4", "'batch-size 4.0' is a rule for exp_avg_sq, not for exp_avg"),
        ("exp_avg", "floor 1", "'floor 1.0' is for exp_avg_sq, whose root is divided by"),
        ("exp_avg", "fill median", "exp_avg has two signs: use 'fill mean' or 'reset'"),
    ],
)
def test_what_has_no_meaning_for_a_moment_is_refused(key: str, text: str, message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        check_moment(key, parse(text), "rule '*.bias'")
    assert str(caught.value).startswith("rule '*.bias': ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("exp_avg", "scale -1"),
        ("exp_avg", "fill -1"),
        ("exp_avg", "fill mean"),
        ("exp_avg", "fill column-mean"),
        ("exp_avg", "fill mean-of *"),
        ("exp_avg_sq", "fill mean-of *"),
        ("exp_avg_sq", "scale 0"),
        ("exp_avg_sq", "reset"),
        ("exp_avg_sq", "floor 0"),
        ("exp_avg_sq", "fill median"),
        ("exp_avg_sq", "batch-size 4"),
    ],
)
def test_what_has_a_meaning_is_accepted(key: str, text: str) -> None:
    assert check_moment(key, parse(text), "rule") is None  # type: ignore[func-returns-value]


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("operation", ["reset", None, 0.5, PruneMagnitude(0.5)])
def test_what_is_no_operation_of_a_policy_is_refused(key: str, operation: object) -> None:
    with pytest.raises(PolicyError) as caught:
        check_moment(key, operation, "rule")
    assert str(caught.value) == (
        f"rule: {key}: expected an operation of megatron_ext.rules, found {operation!r}"
    )


def test_a_floor_that_also_scales_cannot_be_written_so_it_is_refused() -> None:
    with pytest.raises(PolicyError, match="expected a floor without a factor"):
        check_moment("exp_avg_sq", Floor(0.5, 2.0), "rule")
