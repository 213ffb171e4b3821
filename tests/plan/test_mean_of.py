"""Which parameters a rule `fill mean-of` takes its mean from, and which it refuses."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from megatron_ext.errors import PlanError
from megatron_ext.plan.mean_of import Offer, Parts, means_of, offer, sources_of
from megatron_ext.plan.parameters import Parameter, ParameterPlan
from megatron_ext.policy.policy import ResumePolicy
from megatron_ext.policy.presets import Preset
from megatron_ext.rules.base import Rule, Statistic
from megatron_ext.rules.elementwise import KEEP, RESET, Fill, Floor, Scale
from megatron_ext.rules.fill_from import FillFrom
from megatron_ext.rules.mean_of import MeanOf
from megatron_ext.rules.prune import Prune, PruneRandom
from tests.plan.test_moment_plan import plans, rule

NEW = Parameter("layers.0.q_norm", (4,), 0)
FIRST = Parameter("layers.0.k_norm", (4,), 0)
SECOND = Parameter("layers.1.k_norm", (10, 3), 0)
SCALAR = Parameter("layers.2.k_norm", (), 0)
GROWN = Parameter("layers.3.k_norm", (10, 4), 0, saved_rows=6)
ALL = (NEW, FIRST, SECOND, SCALAR, GROWN)
PATTERN = "layers.*.k_norm"


def policy(*others: object, pattern: str = PATTERN, preset: Preset | None = None) -> ResumePolicy:
    rules = (rule("*.q_norm", RESET, MeanOf(pattern)), *others)
    return ResumePolicy(rules=rules, preset=preset or Preset("keep"))  # type: ignore[arg-type]


def parts(
    asked: ResumePolicy,
    parameters: Sequence[Parameter] = ALL,
    new: Sequence[str] = (),
    elsewhere: Sequence[str] = (),
) -> Parts:
    """What the parameters give if each is on a rank of its own, and two ranks hold the last."""
    (wanted,) = means_of(asked)
    decided = plans(asked, *parameters)
    offers = [offer(wanted, [one], new, elsewhere) for one in (*decided, decided[-1])]
    return sources_of(wanted, offers, [p.name for p in parameters])


def refusal(*args: object, **how: object) -> str:
    with pytest.raises(PlanError) as caught:
        parts(*args, **how)  # type: ignore[arg-type]
    return str(caught.value)


def mean(parameter: Parameter, *rows: tuple[int, int], factor: float = 1.0) -> Statistic:
    return Statistic(parameter.name, "exp_avg_sq", "mean", rows, factor=factor)


def test_the_rule_asks_for_a_mean_whose_parameters_are_not_known_yet() -> None:
    (found,) = plans(policy(), NEW)
    wanted = Statistic(PATTERN, "exp_avg_sq", "mean-of", ())
    assert found.rows[0].exp_avg_sq == wanted
    assert found.statistics == (wanted,)
    assert not wanted.reads_old
    assert wanted.multiplier is None


def test_a_mean_is_listed_once_for_each_pattern_and_moment() -> None:
    both = rule("a", MeanOf("*.x"), MeanOf(PATTERN))
    assert means_of(ResumePolicy(rules=(both, rule("b", KEEP, MeanOf(PATTERN)), both))) == (
        Statistic("*.x", "exp_avg", "mean-of", ()),
        Statistic(PATTERN, "exp_avg_sq", "mean-of", ()),
    )
    assert means_of(ResumePolicy(rules=(rule("a", FillFrom("mean"), Fill(1.0)),))) == ()


def test_every_parameter_counts_once_with_its_own_number_of_elements() -> None:
    assert parts(policy()) == {
        mean(FIRST, (0, 4)): 4,
        mean(SECOND, (0, 10)): 30,
        mean(SCALAR, (0, 1)): 1,
        mean(GROWN, (0, 6)): 24,
    }


def test_the_order_is_the_same_on_every_rank() -> None:
    assert list(parts(policy())) == list(parts(policy(), ALL[::-1]))


def test_scaled_rows_count_with_their_new_values() -> None:
    found = parts(policy(rule("layers.1.k_norm[2:5]", RESET, Scale(3.0))), (NEW, SECOND))
    assert found == {
        mean(SECOND, (0, 2), (5, 10)): 21,
        mean(SECOND, (2, 5), factor=3.0): 9,
    }
    found = parts(policy(preset=Preset("gradient-scale", (2.0,))), (NEW, FIRST))
    assert found == {mean(FIRST, (0, 4), factor=4.0): 4}


@pytest.mark.parametrize("done", [RESET, Fill(1.0), Floor(1.0), Prune(0.5), PruneRandom(0.5)])
def test_a_parameter_that_another_rule_changes_is_refused(done: Rule) -> None:
    assert refusal(policy(rule("layers.1.k_norm[2:5]", KEEP, done))) == (
        f"fill mean-of {PATTERN} for exp_avg_sq: expected parameters whose exp_avg_sq is kept or "
        "scaled; found layers.1.k_norm (changed by another rule). Exclude them in the pattern, for "
        "example with re: and (?!...)"
    )


def test_what_is_done_to_the_other_moment_does_not_count() -> None:
    reset = rule("layers.1.k_norm", RESET, KEEP)
    assert parts(policy(reset)) == parts(policy())


def test_rows_that_the_checkpoint_does_not_have_may_be_filled() -> None:
    assert parts(policy(rule("layers.3.k_norm[6:]", RESET, Fill(1.0)))) == parts(policy())
    own = ResumePolicy(rules=(rule("layers.3.k_norm[6:]", KEEP, MeanOf(PATTERN)),))
    assert parts(own) == parts(policy())


def test_a_circle_is_refused() -> None:
    text = refusal(policy(pattern="layers.*_norm"))
    assert "found layers.0.q_norm (this rule sets it itself). Exclude" in text
    rows = ResumePolicy(rules=(rule("layers.1.k_norm[2:5]", KEEP, MeanOf(PATTERN)),))
    assert "layers.1.k_norm (this rule sets it itself)" in refusal(rows)
    others = policy(rule("layers.1.k_norm", KEEP, MeanOf("layers.0.k_norm")), pattern=PATTERN)
    wanted = Statistic(PATTERN, "exp_avg_sq", "mean-of", ())
    offers = [offer(wanted, plans(others, *ALL))]
    assert offers[0].refused == {"layers.1.k_norm": "changed by another rule"}


def test_what_the_preset_changes_is_refused() -> None:
    text = refusal(policy(preset=Preset("relora", (0.5,))))
    assert "found layers.0.k_norm (changed by the preset), layers.1.k_norm (changed by" in text


def test_a_new_parameter_is_refused() -> None:
    new = ("layers.0.q_norm", "layers.1.k_norm")
    assert "found layers.1.k_norm (new to the optimizer). Exclude" in refusal(policy(), new=new)
    # Also where no plan of it is known.
    assert "layers.9.k_norm (new to" in refusal(policy(), new=["layers.9.k_norm"])


def test_a_parameter_of_another_optimizer_is_refused() -> None:
    assert refusal(policy(), elsewhere=("layers.7.k_norm", "layers.7.q_norm")) == (
        f"fill mean-of {PATTERN} for exp_avg_sq: another optimizer of the chain updates "
        "layers.7.k_norm; expected parameters of the optimizer that updates what the rule fills. "
        "Narrow the pattern"
    )


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    assert refusal(policy(pattern="re:.*[.]v_norm"), (NEW, FIRST)) == (
        "fill mean-of re:.*[.]v_norm for exp_avg_sq matches no parameter that holds moments. Names "
        "look like layers.0.q_norm, layers.0.k_norm. Correct the pattern"
    )
    with pytest.raises(PlanError, match=r"look like \(none\)"):
        sources_of(Statistic("a", "exp_avg", "mean-of", ()), [Offer()], ())


def test_a_pattern_has_to_match_the_whole_name() -> None:
    found: tuple[ParameterPlan, ...] = plans(policy(), *ALL)
    for pattern in ("k_norm", "re:layers", "re:k_norm$"):
        assert offer(Statistic(pattern, "exp_avg", "mean-of", ()), found).parts == {}
