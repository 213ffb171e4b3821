"""Moment rules: checked when they are made, registered whole, and known to the kernels."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext._ops.segments import COLUMNS, Segment, encode
from megatron_ext.base.placement import GlobalIndex
from megatron_ext.errors import PlanError, PolicyError
from megatron_ext.rules import registry
from megatron_ext.rules.base import ElementRule, Rule, Statistic
from megatron_ext.rules.batch_size import BatchRatio, BatchSize
from megatron_ext.rules.elementwise import KEEP, Fill, Floor, Keep, Scale
from megatron_ext.rules.form import Form
from megatron_ext.rules.prune import PruneMagnitude, PruneRandom
from megatron_ext.rules.registry import COEFFICIENTS, check_moment, parse, write
from tests.support.half_rule import half
from tests.support.moments import REFERENCE, oracle, rule_pairs
from tests.support.policy_strategies import rules_of
from tests.support.rule_oracles import (
    BETAS,
    NEXT_BETAS,
    NEXT_STEP,
    ORACLES,
    STEP,
    stream_key,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scale(math.inf), "Scale.factor is inf; it must be a finite number"),
        (lambda: Fill(math.nan), "Fill.value is nan"),
        (lambda: Floor(math.inf), "Floor.minimum is inf"),
        (lambda: Floor(0.0, math.nan), "Floor.factor is nan"),
        (lambda: PruneMagnitude(-1.0), "PruneMagnitude.threshold is -1.0; it must be at least 0"),
        (lambda: PruneRandom(1.5), "PruneRandom.probability is 1.5; it must be between 0 and 1"),
        (lambda: BatchSize(0.0, (0.9, 0.95), 1), "BatchSize.ratio is 0.0"),
        (lambda: BatchSize(2.0, (0.0, 0.95), 1), "BatchSize.betas is"),
        (lambda: BatchSize(2.0, (0.9, 1.0), 1), "BatchSize.betas is"),
        (lambda: BatchSize(2.0, (0.9, 0.95), 0), "BatchSize.step is 0; it must be at least 1"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make()
    assert message in str(caught.value)


def test_the_table_by_hand() -> None:
    batch_size = BatchSize(4.0, (0.9, 0.95), 2)
    where = GlobalIndex(1, 2, 3, 4)
    integers, values = encode(
        [
            Segment(3, 5, 8, Floor(0.25, 2.0), PruneRandom(0.5, 7), where, 99),
            Segment(0, 0, 1, Keep(), batch_size),
        ]
    )
    key = stream_key(7, 99)
    assert integers.shape == (2, len(COLUMNS))
    assert values.shape == (2, 2 * COEFFICIENTS)
    signed = key - (1 << 64) if key >= 1 << 63 else key
    assert integers[0].tolist() == [3, 5, 8, 3, 5, 1, 2, 3, 4, 0, signed]
    assert values[0].tolist() == [2.0, 0.25, 0, 0, 0, 0, 0.5, 0, 0, 0, 0, 0]
    assert integers[1, 3:5].tolist() == [0, 6]
    c = 0.1 / 1.9
    corrections = [1 / (1 - 0.81), 1 / (1 - 0.9025)]
    expected = [*corrections, c, 1 / (1 - c), 0.25, 1 - 0.9025]
    assert values[1, COEFFICIENTS:].tolist() == pytest.approx(expected, rel=1e-12)


def test_no_segments_are_empty_tables() -> None:
    integers, values = encode([])
    assert (integers.shape, values.shape) == ((0, 11), (0, 12))


@pytest.mark.parametrize(
    ("exp_avg", "message"),
    [
        (BatchSize(2.0, (0.9, 0.95), 5), "is a rule for exp_avg_sq"),
        (Scale(2.0), "reads exp_avg, which must be kept"),
    ],
)
def test_the_batch_size_rule_is_for_exp_avg_sq_beside_a_kept_exp_avg(
    exp_avg: Scale, message: str
) -> None:
    with pytest.raises(PolicyError, match=message):
        encode([Segment(0, 0, 1, exp_avg, BatchSize(2.0, (0.9, 0.95), 5))])


# --- the registry


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_registered", list(registry.rules()))


def test_a_registered_rule_is_read_written_listed_and_applied(own_registry: None) -> None:
    rule = registry.register(half())
    assert isinstance(parse("halve"), rule)
    assert write(rule()) == "halve"
    assert registry.grammar()["halve"] == "x' = x / 2"
    assert re.fullmatch(registry.pattern(), "halve")
    assert registry.manifest().endswith("\nhalve 99 0 pointwise true")
    check_moment("exp_avg", rule(), "rule")
    m, v = torch.full((3,), 4.0), torch.full((3,), 8.0)
    REFERENCE.run([m], [v], [Segment(0, 0, 3, rule(), KEEP)])
    assert (m.tolist(), v.tolist()) == ([2.0] * 3, [8.0] * 3)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        *(
            ({name: None}, f"moment rule Halve: {name} is not set")
            for name in ("forms", "keeps_bias", "reads_old", "name", "code", "kind")
        ),
        ({"coefficient_names": None}, "coefficient_names is not set"),
        ({"coefficients": None}, "coefficients is not defined"),
        ({"reference": None}, "reference is not defined"),
        ({"code": 1}, "code 1 is that of Scale already"),
        ({"name": "scale"}, "name 'scale' is that of Scale already"),
        ({"kind": "sideways"}, "kind is 'sideways'; expected one of kept, pointwise, positional"),
        ({"coefficient_names": tuple("abcdefg")}, "7 coefficients; at most 6 fit"),
        ({"forms": (Form("keep", "?", "?", "D"),)}, "'keep' is a form of Keep already"),
        ({"forms": (Form("halve", "", "?", "D"),)}, "form 'halve' has no what"),
        ({"forms": (Form("halve", "?", "", "D"),)}, "form 'halve' has no formula"),
        ({"forms": (Form("halve", "?", "?", ""),)}, "form 'halve' has no basis"),
        ({"forms": (Form("halve", "?", "?", "D", moments=()),)}, "form 'halve' has no moments"),
        ({"statistics": ("mean",)}, "of_statistic is not defined, and it has statistics"),
    ],
)
def test_a_rule_of_which_something_is_missing_is_refused_by_name(
    own_registry: None, missing: dict[str, object], message: str
) -> None:
    with pytest.raises(TypeError) as caught:
        registry.register(half(**missing))
    assert message in str(caught.value)
    assert "Halve" not in {rule.__name__ for rule in registry.rules()}


def test_a_form_that_gives_a_field_no_value_is_refused(own_registry: None) -> None:
    @dataclass(frozen=True)
    class Lost(Rule):
        value: float

        forms = (Form("lost", "?", "?", "D"),)
        keeps_bias = True
        reads_old = True

    with pytest.raises(TypeError, match="form 'lost' gives no value to value; resolve is not def"):
        registry.register(Lost)


def test_a_rule_without_a_form_has_to_be_an_element_rule(own_registry: None) -> None:
    @dataclass(frozen=True)
    class Silent(Rule):
        forms = ()
        keeps_bias = True
        reads_old = True

    with pytest.raises(TypeError, match="it has no form, and it is no element rule; resolve is"):
        registry.register(Silent)


def test_an_unregistered_rule_is_nowhere_taken_for_another_one() -> None:
    rule = half()()
    with pytest.raises(TypeError, match=r"Halve\(\) is no registered moment rule; put @register"):
        write(rule)
    with pytest.raises(TypeError, match="no registered moment rule"):
        encode([Segment(0, 0, 1, rule, KEEP)])
    with pytest.raises(PolicyError, match="expected an operation of"):
        check_moment("exp_avg", rule, "rule")
    with pytest.raises(TypeError, match="it has to be resolved first"):
        encode([Segment(0, 0, 1, KEEP, parse("batch-size 2"))])  # type: ignore[arg-type]
    statistic = Statistic("w", "exp_avg", "mode", ())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no moment rule is registered for a statistic of kind"):
        registry.of_statistic(statistic, 1.0)


def test_another_number_of_coefficients_than_declared_is_refused(own_registry: None) -> None:
    rule = registry.register(half(coefficients=lambda self: (1.0, 2.0)))
    with pytest.raises(TypeError, match="has 2 coefficients; expected 0"):
        encode([Segment(0, 0, 1, rule(), KEEP)])


# --- what every registered rule has to have, and what it says of itself


@pytest.mark.parametrize("rule", registry.rules(), ids=lambda r: r.__name__)
def test_every_rule_has_an_oracle_that_it_agrees_with(rule: type[Rule]) -> None:
    assert rule in ORACLES, "tests/support/rule_oracles.py needs a formula in float64"
    generator = np.random.default_rng(1)
    m = generator.normal(size=4001).astype(np.float32)
    v = (m * m * (1 + 9 * generator.random(4001))).astype(np.float32)
    found = ORACLES[rule]
    for key, x, one in (("exp_avg", m, found.exp_avg), ("exp_avg_sq", v, found.exp_avg_sq)):
        expected = oracle(one, x, m, np.arange(4001), 7, key)
        done = applied(one, key, x, m, 7)
        scale = np.abs(x) if isinstance(one, BatchSize | BatchRatio) else np.zeros_like(x)
        assert np.all(np.abs(done - expected) <= 4e-7 * np.abs(expected) + 4e-7 * scale)


def applied(rule: Rule, key: str, x: np.ndarray, m: np.ndarray, parameter: int) -> np.ndarray:
    """A rule as it is applied to a whole parameter, resolved by hand."""
    element = rule.resolve(WholeParameter(key, x.size))
    if isinstance(element, Statistic):
        p = {"median": 0.5, "quantile": element.fraction}.get(element.kind)
        value = np.quantile(np.abs(x), p, method="lower") if p else np.mean(x, dtype=np.float64)
        element = registry.of_statistic(element, float(value))
    new = {"exp_avg": m.copy(), "exp_avg_sq": x.copy()} | {key: x.copy()}
    tensors = {k: torch.from_numpy(a) for k, a in new.items()}
    pair = (element, KEEP) if key == "exp_avg" else (KEEP, element)
    segment = Segment(0, 0, x.size, *pair, parameter=parameter)
    REFERENCE.run([tensors["exp_avg"]], [tensors["exp_avg_sq"]], [segment])
    return new[key].astype(np.float64)


@dataclass(frozen=True)
class WholeParameter:
    """`megatron_ext.rules.base.Context` for a parameter of one row that is all the rule's."""

    key: str
    elements: int
    name: str = "w"
    saved_step: int = STEP
    next_step: int = NEXT_STEP

    def step(self) -> int:
        return STEP

    def saved_betas(self) -> tuple[float, float]:
        return BETAS

    def next_betas(self) -> tuple[float, float]:
        return NEXT_BETAS

    def own_rows(self) -> tuple[tuple[int, int], ...]:
        return ((0, 1),)

    def kept_rows(self, text: str) -> tuple[tuple[tuple[int, int], ...], float]:
        return ((0, 1),), 1.0

    def error(self, text: str) -> PlanError:
        return PlanError(text)


def element_cases() -> list[tuple[str, ElementRule]]:
    """The cases of the oracles, each with its moment."""
    pairs = rule_pairs().values()
    return [case for m, v in pairs for case in (("exp_avg", m), ("exp_avg_sq", v))]


@pytest.mark.parametrize(
    "form", [text for text, (_, form) in registry.forms().items() if "exp_avg_sq" in form.moments]
)
@given(data=st.data())
def test_no_rule_that_is_accepted_makes_exp_avg_sq_negative(form: str, data: st.DataObject) -> None:
    rule = data.draw(rules_of(form, "exp_avg_sq"))
    x = np.array([0.0, data.draw(st.floats(2.0**-100, 2.0**100, width=32))], dtype=np.float32)
    assert not np.any(applied(rule, "exp_avg_sq", x, np.ones_like(x), 3) < 0.0)


@pytest.mark.parametrize(("key", "rule"), element_cases(), ids=str)
def test_what_a_rule_says_of_itself_is_what_it_does(key: str, rule: ElementRule) -> None:
    generator = np.random.default_rng(2)
    x = generator.random(500).astype(np.float32)
    m = np.ones_like(x)
    old, other = applied(rule, key, x, m, 5), applied(rule, key, x * 3, m, 5)
    assert rule.reads_old == bool((old != other).any())
    assert (rule.kind == "kept") == (type(rule) is Keep)
    product = x * np.float32(rule.multiplier) if rule.multiplier is not None else None
    assert product is None or np.array_equal(old, product)
    zeros = applied(rule, key, np.zeros_like(x), np.zeros_like(x), 5)
    assert rule.fills_zeros == (bool(zeros.any()) or type(rule) is Fill)


@pytest.mark.parametrize("name", ["resume-policy", "resume-report"])
def test_the_schemas_take_what_is_read(name: str) -> None:
    schema = json.loads((ROOT / f"megatron_ext/schemas/{name}.schema.json").read_text())
    assert schema["$defs"]["operation"]["pattern"] == registry.pattern()
