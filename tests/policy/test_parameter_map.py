"""The names in a parameter map: patterns, arithmetic on numbers, and what is refused."""

from __future__ import annotations

import pytest

from megatron_ext.errors import PolicyError
from megatron_ext.policy.parameter_map import Copy, ParameterMap
from megatron_ext.policy.policy import ResumePolicy

LAYER = "decoder.layers.{n}.*"


@pytest.mark.parametrize(
    ("to", "source", "name", "expected"),
    [
        (LAYER, "decoder.layers.{n-12}.*", "decoder.layers.13.mlp.a", "decoder.layers.1.mlp.a"),
        (LAYER, "decoder.layers.{n-12}.*", "decoder.layers.11.mlp.a", None),
        (LAYER, "decoder.layers.{n//2}.*", "decoder.layers.7.b", "decoder.layers.3.b"),
        (LAYER, "decoder.layers.{n%3}.*", "decoder.layers.7.b", "decoder.layers.1.b"),
        (LAYER, "decoder.layers.{2*(n+1)-1}.*", "decoder.layers.2.b", "decoder.layers.5.b"),
        (LAYER, "decoder.layers.{n//(n-2)}.*", "decoder.layers.2.b", None),
        (LAYER, "decoder.layers.{n}.*", "output_layer.weight", None),
        ("a.{n}.*.{m}", "b.{m}.*.{n+m}", "a.2.x.y.3", "b.3.x.y.5"),
        ("*.w", "x.*", "a.b.w", "x.a.b"),
        ("*.*", "*-*", "a.b.c", "a.b-c"),
        ("a+b.w", "c.w", "a+b.w", "c.w"),
        ("a+b.w", "c.w", "aab.w", None),
        (r"re:l\.(?P<n>\d+)\.(?P<rest>.*)", "l.{n+1}.{rest}", "l.2.q.w", "l.3.q.w"),
        (r"re:l\.(?P<n>\d{2})", "m.{n}", "l.07", "m.07"),
        (r"re:l\.(?P<n>\d{2})", "m.{n}", "l.7", None),
        ("output_layer.weight", "embedding.weight", "output_layer.weight", "embedding.weight"),
    ],
)
def test_the_source_of_a_parameter(to: str, source: str, name: str, expected: str | None) -> None:
    assert Copy(to, source).source_of(name) == expected


@pytest.mark.parametrize(
    ("to", "source", "state", "says"),
    [
        ("", "a", "all", "expected the name of a parameter, found ''"),
        ("a", "", "all", "expected the name of a parameter, found ''"),
        ("a", "b", "masters", "state is 'masters'; expected all, weights, moments"),
        ("a.{n+1}", "b", "all", "{n+1} stands for a number; expected one name in braces"),
        ("a.{n}.{n}", "b", "all", "not a regular expression: redefinition of group"),
        ("re:(", "b", "all", "not a regular expression"),
        ("a.{n}", "b.{m}", "all", "{m} is not in 'a.{n}'"),
        ("a.{n}", "b.*", "all", "* is not in 'a.{n}'"),
        ("a.*", "b.*.*", "all", "* is not in 'a.*'"),
        ("a.{n}", "b.{n-}", "all", "{n-} cannot be computed"),
        ("a.{n}", "b.{n/2}", "all", "{n/2} cannot be computed"),
        ("a.{n}", "b.{n**2}", "all", "cannot be computed"),
        ("a.{n}", "b.{n.real}", "all", "cannot be computed"),
        ("a.{n}", "b.{int(n)}", "all", "cannot be computed"),
        ("a.{n}", "b.{n+0.5}", "all", "cannot be computed"),
        ("a.{n}", "b.{'x'}", "all", "cannot be computed"),
        ("a.{n}", "b.{}", "all", "cannot be computed"),
    ],
)
def test_a_copy_that_can_never_be_applied(to: str, source: str, state: str, says: str) -> None:
    with pytest.raises(PolicyError, match="parameters: copy") as caught:
        Copy(to, source, state)  # type: ignore[arg-type]
    assert says in str(caught.value)


def test_two_sources_for_one_parameter() -> None:
    twice = ParameterMap(copies=(Copy(LAYER, "x.{n}.*"), Copy("decoder.layers.1.*", "y.*")))
    assert twice.source_of("decoder.layers.0.a")["weights"] == ("x.0.a", f"{LAYER} from x.{{n}}.*")
    with pytest.raises(
        PolicyError, match="1.a has two sources for its weights".replace(".", "[.]")
    ):
        twice.source_of("decoder.layers.1.a")


def test_weights_and_moments_may_have_different_sources() -> None:
    both = ParameterMap(copies=(Copy("a", "b", "weights"), Copy("a", "c", "moments")))
    found = both.source_of("a")
    assert {what: source for what, (source, _) in found.items()} == {"weights": "b", "moments": "c"}
    assert ParameterMap(copies=(Copy("a", "b"), Copy("*", "b"))).source_of("a")["moments"][0] == "b"


@pytest.mark.parametrize("field", ["new", "drop"])
@pytest.mark.parametrize("value", ["mtp.*", [1], ["re:("], [""]])
def test_patterns_are_checked(field: str, value: object) -> None:
    with pytest.raises(PolicyError):
        ParameterMap(**{field: value})  # type: ignore[arg-type]


def test_a_map_is_an_operation_that_is_done_once() -> None:
    policy = ResumePolicy(
        parameters=ParameterMap(
            ("a", "a", "b"), ("c",), (Copy("d", "e"), Copy("f", "g", "moments"))
        )
    )
    assert policy.operations == (
        "new a",
        "new b",
        "drop c",
        "copy d from e",
        "copy f from g (moments)",
    )
    assert policy.needs_optimizer
    assert not policy.without_operations().parameters
    assert policy.without_operations().operations == ()
