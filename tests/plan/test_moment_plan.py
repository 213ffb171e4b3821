"""Which rule applies to which rows of a parameter, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.checkpoint.state import SavedOptimizer
from megatron_ext.errors import PlanError
from megatron_ext.plan.decisions import Circumstances
from megatron_ext.plan.hyperparameters import plan_resume
from megatron_ext.plan.matching import unmatched
from megatron_ext.plan.moments import plan_moments
from megatron_ext.plan.parameters import Parameter, ParameterPlan, Rows
from megatron_ext.policy.match import GroupRule, Match, MomentRule
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import Preset
from megatron_ext.rules.base import Rule, Statistic
from megatron_ext.rules.batch_size import BatchRatio, BatchSize
from megatron_ext.rules.bias_consistent import BiasConsistent
from megatron_ext.rules.elementwise import KEEP, RESET, Fill, Floor, Scale
from megatron_ext.rules.fill_from import FillFrom
from megatron_ext.rules.prune import Prune, PruneRandom
from tests.support.groups import group, without

BETAS = (0.9, 0.95)
W = Parameter("output_layer.weight", (10, 4), 0)
B = Parameter("output_layer.bias", (10,), 0)
SCALAR = Parameter("temperature", (), 0)


def rule(text: str, exp_avg: Rule = KEEP, exp_avg_sq: Rule = KEEP) -> MomentRule:
    return MomentRule(Match.parse(text), exp_avg, exp_avg_sq)


def plans(
    policy: ResumePolicy,
    *parameters: Parameter,
    step: int | None = 100,
    saved: list[dict[str, Any]] | None = None,
    current: list[dict[str, Any]] | None = None,
    **circumstances: Any,
) -> tuple[ParameterPlan, ...]:
    saved = [group(betas=BETAS)] if saved is None else saved
    current = [group(betas=BETAS)] if current is None else current
    plan = plan_resume(
        policy, SavedOptimizer(tuple(saved), step), current, Circumstances(**circumstances)
    )
    return plan_moments(plan, parameters or (W,), saved, current)


def rows(policy: ResumePolicy, parameter: Parameter = W, **how: Any) -> tuple[Rows, ...]:
    (found,) = plans(policy, parameter, **how)
    assert found.parameter == parameter
    return found.rows


def refusal(policy: ResumePolicy, parameter: Parameter = W, **how: Any) -> str:
    with pytest.raises(PlanError) as caught:
        plans(policy, parameter, **how)
    return str(caught.value)


# --- one rule for each row


def test_the_preset_applies_where_no_rule_does() -> None:
    policy = ResumePolicy(
        preset=Preset("reset-momentum"),
        rules=(rule("*.weight[6:8]", KEEP, Scale(2.0)), rule("*.weight[2:4]", Fill(1.0))),
    )
    assert rows(policy) == (
        Rows(0, 2, RESET, KEEP, None),
        Rows(2, 4, Fill(1.0), KEEP, 1),
        Rows(4, 6, RESET, KEEP, None),
        Rows(6, 8, KEEP, Scale(2.0), 0),
        Rows(8, 10, RESET, KEEP, None),
    )
    assert rows(policy, B) == (Rows(0, 10, RESET, KEEP, None),)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*", [(0, 10, 0)]),
        ("*[0:10]", [(0, 10, 0)]),
        ("*[:]", [(0, 10, 0)]),
        ("*[3:]", [(0, 3, None), (3, 10, 0)]),
        ("*[:3]", [(0, 3, 0), (3, 10, None)]),
        ("*[9:10]", [(0, 9, None), (9, 10, 0)]),
        ("*.bias", [(0, 10, None)]),
        ("* ndim=2", [(0, 10, 0)]),
        ("* ndim=1", [(0, 10, None)]),
        ("* wd_mult=1", [(0, 10, 0)]),
        ("* is_expert_parallel=true", [(0, 10, None)]),
    ],
)
def test_rows_of_one_rule(text: str, expected: list[tuple[int, int, int | None]]) -> None:
    found = rows(ResumePolicy(rules=(rule(text, Scale(2.0)),)))
    assert [(r.first, r.last, r.rule) for r in found] == expected


def test_a_number_that_fp32_cannot_hold_is_refused_where_only_the_plan_has_it() -> None:
    message = refusal(ResumePolicy(rules=(rule("*", KEEP, BatchRatio(1e-39)),)))
    assert message.startswith(
        "rule '*' (exp_avg: keep, exp_avg_sq: batch-size 1e-39), output_layer"
    )
    assert "1/k is 1.0000000000000001e+39, which fp32 cannot hold" in message


def test_a_scalar_is_one_row() -> None:
    assert (SCALAR.rows, SCALAR.row_elements, W.rows, W.row_elements) == (1, 1, 10, 4)
    policy = ResumePolicy(rules=(rule("temperature", Scale(2.0)),))
    assert rows(policy, SCALAR) == (Rows(0, 1, Scale(2.0), KEEP, 0),)


def test_a_parameter_without_rows_is_no_trouble() -> None:
    empty = Parameter("e", (0, 4), 0)
    assert rows(ResumePolicy(rules=(rule("e", Scale(2.0)),)), empty) == ()


def test_the_group_of_the_parameter_counts() -> None:
    current = [group(betas=BETAS), group(betas=BETAS, is_expert_parallel=True)]
    policy = ResumePolicy(rules=(rule("* is_expert_parallel=true", RESET, RESET),))
    dense, expert = Parameter("a", (2,), 0), Parameter("b", (2,), 1)
    found = plans(policy, dense, expert, saved=current, current=current)
    assert [p.rows[0].rule for p in found] == [None, 0]


@given(
    length=st.integers(1, 6),
    cuts=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6)), max_size=4),
)
def test_every_row_has_one_rule_or_the_plan_is_refused(
    length: int, cuts: list[tuple[int, int]]
) -> None:
    spans = [(a, b) for a, b in cuts if a < b <= length]
    policy = ResumePolicy(
        rules=tuple(
            MomentRule(Match("w", span), Scale(float(i + 2))) for i, span in enumerate(spans)
        )
    )
    claims = [[i for i, (a, b) in enumerate(spans) if a <= row < b] for row in range(length)]
    parameter = Parameter("w", (length, 3), 0)
    if any(len(c) > 1 for c in claims):
        message = refusal(policy, parameter)
        one, two, first, last = re.fullmatch(
            r"rules '(w\[\S+\])' \(.*?\) and '(w\[\S+\])' \(.*?\) both apply to w, rows (\d+) to "
            r"(\d+); expected one. Narrow one of them",
            message,
        ).groups()  # type: ignore[union-attr]
        named = {i for i, s in enumerate(spans) if f"w[{s[0]}:{s[1]}]" in (one, two)}
        assert all(len(set(claims[row]) & named) > 1 for row in range(int(first), int(last) + 1))
        assert int(first) <= int(last)
        return
    found = rows(policy, parameter)
    told = [r.rule for r in found for _ in range(r.first, r.last)]
    assert told == [c[0] if c else None for c in claims]
    assert [r.first for r in found] == [0, *(r.last for r in found[:-1])]
    assert all(r.exp_avg == (KEEP if r.rule is None else Scale(float(r.rule + 2))) for r in found)


def test_two_rules_that_meet_are_both_named_with_the_parameter() -> None:
    policy = ResumePolicy(rules=(rule("*.weight[2:5]", RESET), rule("output_*[4:8]", Scale(2.0))))
    assert refusal(policy) == (
        "rules '*.weight[2:5]' (exp_avg: reset, exp_avg_sq: keep) and 'output_*[4:8]' (exp_avg: "
        "scale 2.0, exp_avg_sq: keep) both apply to output_layer.weight, rows 4 to 4; expected "
        "one. Narrow one of them"
    )


@pytest.mark.parametrize(
    ("one", "two", "where"),
    [
        ("*", "*.weight", "rows 0 to 9"),
        ("*.weight", "output_layer.weight[3:5]", "rows 3 to 4"),
        ("*[3:5]", "*.weight", "rows 3 to 4"),
        ("*[:6]", "*[5:]", "rows 5 to 5"),
        ("*[2:9]", "*[4:5]", "rows 4 to 4"),
    ],
)
def test_a_rule_for_a_whole_parameter_meets_one_for_its_rows(
    one: str, two: str, where: str
) -> None:
    message = refusal(ResumePolicy(rules=(rule(one, RESET), rule(two, RESET))))
    assert f"'{one}'" in message
    assert f"'{two}'" in message
    assert f"both apply to output_layer.weight, {where}; expected one" in message


def test_rules_that_only_touch_do_not_meet() -> None:
    policy = ResumePolicy(rules=(rule("*[5:]", RESET), rule("*[:5]", RESET)))
    assert [(r.first, r.last, r.rule) for r in rows(policy)] == [(0, 5, 1), (5, 10, 0)]


@pytest.mark.parametrize("text", ["*[8:11]", "*[10:]", "*[10:11]", "*[32000:]", "*[:11]"])
def test_rows_that_a_parameter_does_not_have_are_refused(text: str) -> None:
    message = refusal(ResumePolicy(rules=(rule(text, RESET),)))
    assert message.startswith(f"rule '{text}' (exp_avg: reset, exp_avg_sq: keep): ")
    assert "output_layer.weight has shape (10, 4), so no rows " in message
    assert message.endswith("; expected rows within 0:10")


def test_a_scalar_has_no_rows() -> None:
    message = refusal(ResumePolicy(rules=(rule("temperature[0:1]", RESET),)), SCALAR)
    assert "temperature has shape (), so no rows 0:1" in message


# --- fills and quantiles

MEANS = ("mean", "median", "column-mean")


def filled(*others: MomentRule, kind: Any = "mean", last: str = "*[8:]") -> tuple[Rows, ...]:
    return rows(ResumePolicy(rules=(*others, rule(last, KEEP, FillFrom(kind)))))


@pytest.mark.parametrize("kind", MEANS)
def test_a_fill_asks_for_the_rows_that_are_kept(kind: Any) -> None:
    (kept, new) = filled(kind=kind)
    assert kept == Rows(0, 8, KEEP, KEEP, None)
    assert new.exp_avg == KEEP
    assert new.exp_avg_sq == Statistic(W.name, "exp_avg_sq", kind, ((0, 8),))


def test_rows_that_are_set_or_pruned_do_not_count() -> None:
    for other in (RESET, Fill(1.0), Floor(1.0), PruneRandom(0.5), Prune(0.5)):
        found = filled(rule("*[2:4]", KEEP, other))
        assert found[-1].exp_avg_sq == Statistic(W.name, "exp_avg_sq", "mean", ((0, 2), (4, 8)))


def test_what_is_done_to_the_other_moment_does_not_count() -> None:
    assert filled(rule("*[2:4]", RESET))[-1].exp_avg_sq == Statistic(
        W.name, "exp_avg_sq", "mean", ((0, 2), (2, 4), (4, 8))
    )


def test_rows_that_are_scaled_count_with_their_factor() -> None:
    found = filled(rule("*[:8]", KEEP, Scale(4.0)))
    assert found[-1].exp_avg_sq == Statistic(W.name, "exp_avg_sq", "mean", ((0, 8),), factor=4.0)
    both = ResumePolicy(
        preset=Preset("gradient-scale", (3.0,)),
        rules=(rule("*[8:]", FillFrom("mean"), FillFrom("column-mean")),),
    )
    assert rows(both)[-1].exp_avg == Statistic(W.name, "exp_avg", "mean", ((0, 8),), factor=3.0)
    assert rows(both)[-1].exp_avg_sq == Statistic(
        W.name, "exp_avg_sq", "column-mean", ((0, 8),), factor=9.0
    )


def test_rows_that_are_scaled_by_different_factors_are_refused() -> None:
    policy = ResumePolicy(
        rules=(rule("*[:4]", KEEP, Scale(4.0)), rule("*[8:]", KEEP, FillFrom("mean")))
    )
    assert refusal(policy) == (
        "rule '*[8:]' (exp_avg: keep, exp_avg_sq: fill mean), output_layer.weight: 'fill mean': "
        "the other rows are scaled by different factors, [1.0, 4.0]; expected one. Apply the "
        "rules in two resumes"
    )


def test_a_fill_without_kept_rows_is_refused() -> None:
    policy = ResumePolicy(
        rules=(rule("*[:8]", KEEP, RESET), rule("*[8:]", KEEP, FillFrom("median")))
    )
    assert refusal(policy) == (
        "rule '*[8:]' (exp_avg: keep, exp_avg_sq: fill median), output_layer.weight: 'fill median' "
        "needs rows that are kept or scaled, and output_layer.weight has none. Fill with a number, "
        "or keep some rows"
    )


def test_a_fill_of_a_whole_parameter_takes_all_its_rows() -> None:
    for text in ("*", "*[0:10]"):
        (only,) = rows(ResumePolicy(rules=(rule(text, FillFrom("mean"), FillFrom("median")),)))
        assert only.exp_avg == Statistic(W.name, "exp_avg", "mean", ((0, 10),))
        assert only.exp_avg_sq == Statistic(W.name, "exp_avg_sq", "median", ((0, 10),))


def test_a_quantile_is_that_of_the_rules_rows() -> None:
    policy = ResumePolicy(rules=(rule("*[2:7]", Prune(0.25), Prune(0.75)),))
    found = rows(policy)[1]
    assert found.exp_avg == Statistic(W.name, "exp_avg", "quantile", ((2, 7),), 0.25)
    assert found.exp_avg_sq == Statistic(W.name, "exp_avg_sq", "quantile", ((2, 7),), 0.75)


def test_the_presets_quantile_is_one_for_all_rows_that_no_rule_names() -> None:
    policy = ResumePolicy(preset=Preset("relora", (0.5,)), rules=(rule("*[2:7]"),))
    (parameter,) = plans(policy)
    quantile = Statistic(W.name, "exp_avg", "quantile", ((0, 2), (7, 10)), 0.5)
    assert [r.exp_avg for r in parameter.rows] == [quantile, KEEP, quantile]
    assert [s.key for s in parameter.statistics] == ["exp_avg", "exp_avg_sq"]


GROWN = Parameter("output_layer.weight", (10, 4), 0, saved_rows=6)


@pytest.mark.parametrize(
    ("text", "spans"),
    [("*[6:]", ((0, 6),)), ("*[8:]", ((0, 6),)), ("*[2:4]", ((0, 2), (4, 6))), ("*", ((0, 6),))],
)
def test_new_rows_are_never_what_a_fill_is_taken_from(
    text: str, spans: tuple[tuple[int, int], ...]
) -> None:
    policy = ResumePolicy(rules=(rule(text, RESET, FillFrom("mean")),))
    found = [r.exp_avg_sq for r in rows(policy, GROWN) if r.rule == 0]
    assert found == [Statistic(GROWN.name, "exp_avg_sq", "mean", spans)]


def test_a_fill_from_new_rows_alone_is_refused() -> None:
    text = refusal(ResumePolicy(rules=(rule("*[:6]", KEEP, FillFrom("mean")),)), GROWN)
    assert "has none that the checkpoint has" in text


def test_a_factor_of_new_rows_does_not_count() -> None:
    policy = ResumePolicy(
        rules=(rule("*[8:]", KEEP, Scale(2.0)), rule("*[5:6]", KEEP, FillFrom("mean")))
    )
    found = rows(policy, GROWN)[1].exp_avg_sq
    assert found == Statistic(GROWN.name, "exp_avg_sq", "mean", ((0, 5),))


def test_the_presets_quantile_is_that_of_the_old_rows() -> None:
    policy = ResumePolicy(preset=Preset("relora", (0.9,)))
    (found,) = rows(policy, GROWN)
    assert found.exp_avg == Statistic(GROWN.name, "exp_avg", "quantile", ((0, 6),), 0.9)
    (found,) = [
        r for r in rows(ResumePolicy(rules=(rule("*[7:]", Prune(0.5)),)), GROWN) if r.rule == 0
    ]
    assert found.exp_avg == KEEP


def test_a_parameter_with_fewer_rows_has_no_new_ones() -> None:
    fewer = Parameter("output_layer.weight", (10, 4), 0, saved_rows=16)
    policy = ResumePolicy(rules=(rule("*[8:]", RESET, FillFrom("mean")),))
    assert rows(policy, fewer)[1].exp_avg_sq == Statistic(W.name, "exp_avg_sq", "mean", ((0, 8),))


def test_statistics_are_listed_once() -> None:
    policy = ResumePolicy(
        rules=tuple(rule(t, FillFrom("mean"), FillFrom("mean")) for t in ("*[:2]", "*[8:]"))
    )
    (parameter,) = plans(policy)
    assert parameter.statistics == (
        Statistic(W.name, "exp_avg", "mean", ((2, 8),)),
        Statistic(W.name, "exp_avg_sq", "mean", ((2, 8),)),
    )
    assert plans(ResumePolicy())[0].statistics == ()


# --- the batch-size rule


def test_the_batch_size_rule_has_the_checkpoints_betas_and_step() -> None:
    policy = ResumePolicy(preset=Preset("batch-size", (256, 1024)))
    current = [group(betas=(0.9, 0.8))]
    (only,) = rows(policy, saved=[group(betas=[0.8, 0.9])], current=current, step=7)
    assert only == Rows(0, 10, KEEP, BatchSize(4.0, (0.8, 0.9), 7), None)


@pytest.mark.parametrize("exp_avg", [RESET, Scale(2.0), FillFrom("mean"), Prune(0.5)])
def test_the_batch_size_rule_needs_exp_avg_as_it_is(exp_avg: Rule) -> None:
    text = "*" if exp_avg != FillFrom("mean") else "*[:]"
    message = refusal(ResumePolicy(rules=(rule(text, exp_avg, BatchRatio(4.0)),)))
    assert message.startswith(f"rule '{text}' (exp_avg: ")
    assert "output_layer.weight: the batch-size rule for exp_avg_sq reads exp_avg, which" in message


def test_the_batch_size_rule_before_the_first_step_is_refused() -> None:
    policy = ResumePolicy(rules=(rule("*", KEEP, BatchRatio(4.0)),))
    for step in (None, 0):
        message = refusal(policy, step=step)
        assert "output_layer.weight: the checkpoint was written before the first step" in message


# --- bias-consistent

CONSISTENT = ResumePolicy(preset=Preset("bias-consistent"))


@given(
    old=st.tuples(st.floats(0.1, 0.999), st.floats(0.1, 0.9999)),
    new=st.tuples(st.floats(0.1, 0.999), st.floats(0.1, 0.9999)),
    step=st.integers(1, 5000),
    after=st.integers(1, 5000),
)
def test_bias_consistent_keeps_the_corrected_moments(
    old: tuple[float, float], new: tuple[float, float], step: int, after: int
) -> None:
    policy = ResumePolicy(preset=Preset("bias-consistent"), step=after)
    (only,) = rows(policy, saved=[group(betas=old)], current=[group(betas=new)], step=step)
    for found, before, now in zip((only.exp_avg, only.exp_avg_sq), old, new, strict=True):
        expected = (1 - now**after) / (1 - before**step)
        assert (found.factor if isinstance(found, Scale) else 1.0) == pytest.approx(expected)
        assert isinstance(found, Scale) or expected == 1.0


def test_bias_consistent_by_hand() -> None:
    (only,) = rows(CONSISTENT, current=[group(betas=(0.8, 0.95))], step=2)
    assert isinstance(only.exp_avg, Scale)
    assert only.exp_avg.factor == pytest.approx((1 - 0.64) / (1 - 0.81))
    assert only.exp_avg_sq == KEEP


def test_bias_consistent_takes_the_betas_that_are_kept() -> None:
    policy = ResumePolicy(("betas",), preset=Preset("bias-consistent"))
    (only,) = rows(policy, current=[group(betas=(0.8, 0.99))], step=2)
    assert (only.exp_avg, only.exp_avg_sq) == (KEEP, KEEP)


def test_bias_consistent_with_step_0_is_refused() -> None:
    policy = ResumePolicy(preset=Preset("bias-consistent"), step="reset")
    assert refusal(policy) == (
        "preset bias-consistent, output_layer.weight: with step 0 the bias-consistent moments are "
        "all 0. Keep step, give it a number, or reset the moments"
    )
    by_rule = ResumePolicy(rules=(rule("*", KEEP, BiasConsistent()),), step=0)
    assert "rule '*' (exp_avg: keep, exp_avg_sq: bias-consistent), output_" in refusal(by_rule)


def test_bias_consistent_before_the_first_step_keeps() -> None:
    for step in (None, 0):
        (only,) = rows(CONSISTENT, current=[group(betas=(0.8, 0.99))], step=step)
        assert (only.exp_avg, only.exp_avg_sq) == (KEEP, KEEP)


def test_bias_consistent_rows_count_as_scaled_for_a_fill() -> None:
    policy = ResumePolicy(
        preset=Preset("bias-consistent"), rules=(rule("*[8:]", KEEP, FillFrom("mean")),)
    )
    found = rows(policy, current=[group(betas=(0.9, 0.99))], step=2)
    factor = (1 - 0.99**2) / (1 - 0.95**2)
    assert found[-1].exp_avg_sq == Statistic(
        W.name, "exp_avg_sq", "mean", ((0, 8),), factor=pytest.approx(factor)
    )


# --- betas that are not there


def test_without_betas_in_the_checkpoint_the_rule_is_refused() -> None:
    message = refusal(CONSISTENT, saved=[without(group(), "betas")])
    assert message == (
        "preset bias-consistent, output_layer.weight: it needs the betas of the checkpoint, but "
        "the parameter's group has no counterpart there and the saved groups have none"
    )


def test_a_group_without_counterpart_takes_the_betas_all_saved_groups_have() -> None:
    current = [group(betas=BETAS, lr_mult=0.5)]
    same = [group(betas=BETAS), group(betas=list(BETAS), wd_mult=0.0)]
    policy = ResumePolicy(rules=(rule("*", KEEP, BatchRatio(4.0)),))
    assert rows(policy, saved=same, current=current)[0].exp_avg_sq == BatchSize(4.0, BETAS, 100)
    differ = [group(betas=BETAS), group(betas=(0.9, 0.99), wd_mult=0.0)]
    assert "the saved groups have [(0.9, 0.95), (0.9, 0.99)]" in refusal(
        policy, saved=differ, current=current
    )


@pytest.mark.parametrize("current", [without(group(), "betas"), group(betas=None)])
def test_without_betas_in_the_run_the_rule_is_refused(current: dict[str, Any]) -> None:
    message = refusal(CONSISTENT, current=[current])
    assert message == (
        "preset bias-consistent, output_layer.weight: it needs betas, but its param_group has none"
    )


# --- the same on every rank


@given(data=st.data(), count=st.integers(1, 4))
def test_what_is_decided_for_one_parameter_does_not_depend_on_the_others(
    data: st.DataObject, count: int
) -> None:
    parameters = [Parameter(f"layers.{i}.weight", (i + 3, 2), 0) for i in range(count)]
    rules = (rule("layers.1.*[2:]", RESET, FillFrom("mean")), rule("layers.2.*", Scale(2.0)))
    preset = data.draw(st.sampled_from((Preset(), Preset("gradient-scale", (2.0,)))))
    policy = ResumePolicy(preset=preset, rules=rules)
    together = plans(policy, *parameters)
    order = data.draw(st.permutations(parameters))
    alone = {p.name: plans(policy, p)[0] for p in order}
    assert together == tuple(alone[p.name] for p in parameters)


# --- rules that match nothing


def test_rules_that_match_nothing_are_named() -> None:
    policy = ResumePolicy(
        groups=(GroupRule((("a", 1),), ("eps",)), GroupRule((("b", 2),), ("eps",))),
        rules=(rule("x", RESET), rule("y*"), rule("z")),
    )
    names = ["decoder.a", "decoder.b", "decoder.c", "decoder.d"]
    assert unmatched(policy, {1}, {0}, names) == (
        "2 of 3 rules match no parameter that holds moments: rule 'x' (exp_avg: reset, exp_avg_sq: "
        "keep); rule 'z' (exp_avg: keep, exp_avg_sq: keep). Names look like decoder.a, decoder.b, "
        "decoder.c. group rule 'b=2' fits no param_group"
    )
    assert unmatched(policy, {0, 1, 2}, {0}, names) == "group rule 'b=2' fits no param_group"
    assert unmatched(policy, {0, 1, 2}, {0, 1}, names) == ""
    assert "Names look like (none)" in unmatched(policy, (), (0, 1), ())
    assert unmatched(ResumePolicy(), (), (), ()) == ""
