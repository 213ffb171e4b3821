"""Regular expressions in linear time: what `re` says, without what `re` needs for it."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.base.patterns import compiled
from megatron_ext.base.regex import Regex
from megatron_ext.base.regex_parser import MAX_INSTRUCTIONS, MAX_LENGTH, PatternError

_ATOMS = st.sampled_from(
    (*"ab01.", r"\.", r"\d", r"\w", r"\W", r"\S", "[ab]", "[^a.]", r"[\d_-]", "[]a]", "é")
)


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    quantifier = st.sampled_from(("*", "+", "?", "{2}", "{1,3}", "{,2}", "{1,}", "*?", "+?", "??"))
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        st.builds("({})".format, inner),
        st.builds("(?:{}){}".format, inner, quantifier),
    )


EXPRESSIONS = st.recursive(_ATOMS, _larger, max_leaves=8)
NAMES = st.text("ab01._-é٣ \n", max_size=12)


@settings(max_examples=500, deadline=None)
@given(text=EXPRESSIONS, names=st.lists(NAMES, max_size=8))
def test_a_name_fits_if_re_says_so(text: str, names: list[str]) -> None:
    ours, theirs = Regex(text), re.compile(text)
    for name in names:
        assert ours.fits(name) == (theirs.fullmatch(name) is not None), (text, name)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (r"(?P<a>.*)\.(?P<b>\d+)\.(?P<c>.*)", "x.1.2.3.y"),
        (r"(?P<a>.*?)\.(?P<b>\d+)\.(?P<c>.*)", "x.1.2.3.y"),
        (r"(?P<a>x)?(?P<b>y|yz)(?P<c>z*)", "yzz"),
        (r"((?P<a>\w+)\.)+", "one.two.three."),
        (r"(?P<a>a{1,3})(?P<b>a{1,3}?)(?P<c>a*)", "aaaaaa"),
        (r"^(?P<a>a|b)$", "b"),
        (r"(?P<a>a|b)\$", "b$"),
    ],
)
def test_the_groups_are_those_of_re(text: str, name: str) -> None:
    found = re.fullmatch(text, name)
    assert found is not None
    assert Regex(text).match(name) == found.groupdict()
    assert Regex(text).match(name + "\n") is None


@pytest.mark.parametrize(
    "text", [r"(?!a)\w*", r"(?!a|bc)(?:.+)", r"(?!ab\.)a.*", r"(?!a)(?!.*c)\w+", r"(?!(a))(b|c)*"]
)
def test_a_look_ahead_at_the_beginning_leaves_names_out(text: str) -> None:
    fits = compiled(f"re:{text}")
    for name in map("".join, itertools.product("abc.", repeat=3)):
        assert fits(name) == (re.fullmatch(text, name) is not None)


@pytest.mark.parametrize(
    "text", [r"(\w+\.?)+!", "(a*)*b", "(a|a)*b", "(a|aa)+b", "a?" * 40 + "a" * 40, "(.*a){8}b"]
)
def test_what_takes_re_forever_is_matched_at_once(text: str) -> None:
    begin = time.process_time()
    fits = compiled(f"re:{text}")
    for _ in range(100):
        assert not fits("a" * 2000 + "?")
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(", "not a regular expression: missing )"),
        ("a**", "not a regular expression: multiple repeat"),
        ("a{99999999999}", "not a regular expression: the repetition number is too large"),
        (r"(a)\1", r"'\\1' cannot be matched in linear time; expected literals"),
        ("(?P<x>a)(?P=x)", "'(?P=' cannot be matched in linear time"),
        ("(?!a)b|c", "put the choice after '(?!a)' into parentheses"),
        ("b(?!a)", "'(?!a' cannot"),
        ("(?!ab$)a.*", "'$)a.' cannot"),
        ("(?=a)b", "'(?=a' cannot"),
        ("(?<!a)b", "'(?<!' cannot"),
        ("(?i)a", "'(?i)' cannot"),
        (r"a\b", r"'\\b' cannot"),
        (r"\x41", r"'\\x41' cannot"),
        ("a^b", "'^b' cannot"),
        ("a$b", "'$b' cannot"),
        ("a*+", "'+' cannot"),
        ("[é-ü]", "has a character that is not ASCII in a class"),
        ("a" * (MAX_LENGTH + 1), f"it has {MAX_LENGTH + 1} characters; expected at most"),
        ("(" * 20 + ")" * 20, "its groups are nested more than 16 deep"),
        ("a{600}", "{600} repeats more than 512 times"),
        ("(a{30}){30}", f"it has more than {MAX_INSTRUCTIONS} parts"),
        ("(((){99}){99}){99}", "it repeats too much; write + or *"),
        (".*a.{30}", "there are too many ways to match it; write fewer"),
    ],
)
def test_what_cannot_be_bounded_is_refused(text: str, why: str) -> None:
    with pytest.raises(PatternError) as caught:
        compiled(f"re:{text}")
    assert why in str(caught.value)
    assert "without 're:' it is a glob" in str(caught.value)


def test_a_glob_is_bounded_too() -> None:
    fits = compiled("*a" * 128)
    begin = time.process_time()
    for _ in range(100):
        assert not fits("a" * 127 + "b" * 2000)
    assert time.process_time() - begin < 2
    with pytest.raises(PatternError, match="it has 257 characters; expected at most 256"):
        compiled("*" * 257)


def test_many_patterns_meet_many_names_in_seconds() -> None:
    names = [
        f"decoder.layers.{n}.{part}.linear_fc{f}.weight"
        for n in range(1250)
        for part in ("mlp", "mlp.experts.local_experts.3", "self_attention", "cross_attention")
        for f in (1, 2)
    ]
    patterns = [rf"re:.*layers\.{n}\d*\..*(fc1|fc2)[.]weight" for n in range(100)]
    patterns += [f"*layers.{n}*.weight" for n in range(100)]
    begin = time.process_time()
    matched = sum(1 for pattern in map(compiled, patterns) for name in names if pattern(name))
    assert len(names) == 10_000
    assert matched > 10_000
    assert time.process_time() - begin < 20
